"""How long a layer takes under a split: the three resources CPU, host-to-accelerator link and accelerator, many
splits at once.

The model. The CPU's tokens travel to the host first; then its experts run one after another; then all results travel
back. The link brings absent experts one at a time, those with most work first, behind what is under way; results go
ahead of loads that have not begun, and a load that has begun is not interrupted (APTMoE, demand-priority scheduling).
The accelerator computes what is there and, in the order of landing, what comes. The layer ends when CPU results are
back and the accelerator is done.

Order of loads: all loads take equally long, so this is a two-machine flow shop in which Johnson's rule says: most
accelerator seconds first. (Moving more work to an earlier landing never adds to the work that lands after any moment.)
Computing in the order of landing is optimal for one machine with release times.

Legend: ``S`` splits evaluated at once, ``M`` experts with tokens, as columns in the order of landing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.problem import LayerProblem
from isthmus.spec.plan import LayerSplit

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]
"""(S, M): True where the expert of a column is computed on the accelerator."""


@dataclass(frozen=True)
class LayerColumns:
    """The experts with tokens in the order of landing: residents, arriving ones by arrival, absent ones."""

    problem: LayerProblem
    experts_M: NDArray[np.int64]
    tokens_M: Floats
    cpu_s_M: Floats
    accelerator_s_M: Floats
    ready_s_M: Floats
    """Landing times; of absent ones the time at which the link is free for their loads."""
    link_free_s: float
    """When the link has brought what is on its way: loads and CPU results come after it."""
    first_arriving: int
    first_absent: int
    """Columns from which on experts are on their way, and from which on they are absent."""

    @property
    def link_s_M(self) -> Floats:
        """Seconds that an expert on the accelerator keeps the link busy: of the two directions, the busier one."""
        problem = self.problem
        load_s = np.where(np.arange(len(self.experts_M)) >= self.first_absent, problem.load_s, 0.0)
        return np.maximum(load_s, problem.unload_s)

    def mask(self, experts: frozenset[int]) -> Masks:
        """(M,) of one split."""
        return np.array([int(expert) in experts for expert in self.experts_M], dtype=np.bool_)

    def split(self, mask_M: Masks, predicted_s: float) -> LayerSplit:
        """The split of one mask (M,): experts by number, loads in the order of landing."""
        return LayerSplit(
            on_accelerator=tuple(sorted(self.experts_M[mask_M].tolist())),
            on_cpu=tuple(sorted(self.experts_M[~mask_M].tolist())),
            load_order=tuple(self.experts_M[self.first_absent :][mask_M[self.first_absent :]].tolist()),
            predicted_s=predicted_s,
        )


def columns(problem: LayerProblem) -> LayerColumns:
    """Sorts the experts that have tokens. What is on its way shares the link with loads, so loads start after it."""
    used = [expert for expert, count in enumerate(problem.counts) if count]
    work = problem.accelerator_s
    by_work = sorted(used, key=lambda expert: (-work[expert], expert))
    resident = [expert for expert in by_work if expert in problem.resident]
    arriving = sorted(
        (expert for expert in by_work if expert in problem.arriving_s and expert not in problem.resident),
        key=lambda expert: problem.arriving_s[expert],
    )
    absent = [expert for expert in by_work if problem.is_absent(expert)]
    link_free_s = max([problem.link_backlog_s, *problem.arriving_s.values()])
    ready = [0.0] * len(resident) + [problem.arriving_s[e] for e in arriving] + [link_free_s] * len(absent)
    experts = resident + arriving + absent
    return LayerColumns(
        problem=problem,
        experts_M=np.array(experts, dtype=np.int64),
        tokens_M=np.array([problem.counts[e] for e in experts], dtype=np.float64),
        cpu_s_M=np.array([problem.cpu_s[e] for e in experts], dtype=np.float64),
        accelerator_s_M=np.array([work[e] for e in experts], dtype=np.float64),
        ready_s_M=np.array(ready, dtype=np.float64),
        link_free_s=link_free_s,
        first_arriving=len(resident),
        first_absent=len(resident) + len(arriving),
    )


def makespans(layer: LayerColumns, on_SM: Masks) -> Floats:
    """Seconds of the layer under each split, (S,). M may be 0."""
    problem = layer.problem
    if on_SM.shape[1] == 0:
        return np.zeros(on_SM.shape[0])
    tokens_S = ~on_SM @ layer.tokens_M
    has_cpu_S: Masks = np.any(~on_SM, axis=1)
    cpu_start_S = np.maximum(problem.cpu_backlog_s, tokens_S * problem.token_d2h_s)
    cpu_end_S = cpu_start_S + ~on_SM @ layer.cpu_s_M
    return_s_S = tokens_S * problem.token_h2d_s
    ready_SM = np.repeat(layer.ready_s_M[None], len(on_SM), axis=0)
    link_free_s = layer.link_free_s
    if layer.first_absent < on_SM.shape[1]:
        rank_SN = on_SM[:, layer.first_absent :].cumsum(axis=1)
        # Loads that have begun when the CPU is done go first.
        begun_S = rank_SN[:, -1].astype(np.float64)
        if problem.load_s > 0:
            begun_S = np.clip(np.ceil((cpu_end_S - link_free_s) / problem.load_s), 0, begun_S)
        return_start_S = np.maximum(cpu_end_S, link_free_s + begun_S * problem.load_s)
        delay_SN = np.where((rank_SN > begun_S[:, None]) & has_cpu_S[:, None], return_s_S[:, None], 0.0)
        landed_SN = link_free_s + rank_SN * problem.load_s + delay_SN
        ready_SM[:, layer.first_absent :] = landed_SN
    else:
        return_start_S = np.maximum(cpu_end_S, link_free_s)
    left_SM: Floats = (on_SM * layer.accelerator_s_M)[:, ::-1].cumsum(axis=1)[:, ::-1]
    accelerator_end_S = np.maximum(
        (on_SM * (ready_SM + left_SM)).max(axis=1),
        np.where(on_SM.any(axis=1), problem.accelerator_backlog_s + left_SM[:, 0], 0.0),
    )
    return np.maximum(np.where(has_cpu_S, return_start_S + return_s_S, 0.0), accelerator_end_S)


def split_makespan_s(problem: LayerProblem, on_accelerator: frozenset[int]) -> float:
    """Seconds of the layer if exactly the experts in ``on_accelerator`` (those with tokens count) run there."""
    layer = columns(problem)
    return float(makespans(layer, layer.mask(on_accelerator)[None])[0])
