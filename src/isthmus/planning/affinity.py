"""Our split rule: the subset of experts on the accelerator that makes the layer end first, given a price for link time.

Proven: with up to ``EXACT_EXPERTS`` experts that have tokens all subsets are compared, so the split is optimal for the
model of ``makespan.py``; with more it is never worse than all experts on the CPU, all on the accelerator, or Equation
1, which are always among the candidates (those that ``max_on_accelerator`` allows).

Measured, with more: the best threshold sets (the i, j, k most popular of the resident, arriving and absent experts;
for given numbers they leave the CPU the least work) are refined by flips of one or two experts. Over 300 problems with
skewed counts that came within 1.001 of optimal. With random costs, the CPU anything from four times as fast as the
accelerator to twenty times as slow, 1.5 % of 600 problems ended above 1.02 × optimal, the worst at 1.07.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.planning.equation_one import equation_one_experts
from isthmus.planning.makespan import Floats, LayerColumns, Masks, columns, makespans
from isthmus.planning.problem import LayerProblem
from isthmus.spec.plan import LayerSplit

EXACT_EXPERTS = 9
NUM_THRESHOLD_SETS = 24
"""Threshold sets that are evaluated exactly, the rest having been ranked without the results' way back."""
MAX_ARRIVING_THRESHOLDS = 8
MAX_ROUNDS = 3
MAX_PAIRS = 120


def affinity(problem: LayerProblem, *, link_price: float = 0.0) -> LayerSplit:
    """Minimises makespan + ``link_price`` × link seconds (0 or more; what a link second is worth elsewhere in the
    pass).

    Ties go to the split that uses the link least. ``predicted_s`` is the makespan without the price.
    """
    layer = columns(problem)
    num = len(layer.experts_M)
    if num <= EXACT_EXPERTS:
        subsets = np.arange(2**num)[:, None] >> np.arange(num)[None, :] & 1 == 1
        best = _cheapest(layer, subsets, link_price, beam=1)
        return layer.split(best.masks_SM[0], best.seconds_S[0])
    # Few large experts are hard to balance and cheap to try; many small ones are the opposite.
    beam = max(1, min(4, 48 // num))
    best = _cheapest(layer, np.concatenate([_named_sets(layer), _threshold_sets(layer, link_price)]), link_price, beam)
    for _ in range(MAX_ROUNDS):
        near = np.concatenate([best.masks_SM, *(_neighbours(layer, mask_M) for mask_M in best.masks_SM)])
        found = _cheapest(layer, near, link_price, beam)
        if found.costs == best.costs:
            break
        best = found
    return layer.split(best.masks_SM[0], best.seconds_S[0])


@dataclass(frozen=True)
class _Found:
    """Distinct splits, cheapest first."""

    masks_SM: Masks
    costs: list[float]
    seconds_S: list[float]


def _cheapest(layer: LayerColumns, masks_SM: Masks, link_price: float, beam: int) -> _Found:
    """The ``beam`` cheapest distinct splits that fit; among equals, those with the least link time first."""
    masks_SM = masks_SM[masks_SM.sum(axis=1) <= layer.problem.max_on_accelerator]
    seconds_S = makespans(layer, masks_SM)
    link_s_S = masks_SM @ layer.link_s_M
    cost_S = seconds_S + link_price * link_s_S
    rows: dict[bytes, int] = {}
    for row in np.lexsort((link_s_S, cost_S.round(12))).tolist():
        rows.setdefault(masks_SM[row].tobytes(), row)
        if len(rows) == beam:
            break
    chosen = list(rows.values())
    return _Found(masks_SM=masks_SM[chosen], costs=cost_S[chosen].tolist(), seconds_S=seconds_S[chosen].tolist())


def _named_sets(layer: LayerColumns) -> Masks:
    """All on the CPU, all on the accelerator, and Equation 1."""
    num = len(layer.experts_M)
    return np.stack([np.zeros(num, np.bool_), np.ones(num, np.bool_), layer.mask(equation_one_experts(layer.problem))])


def _threshold_sets(layer: LayerColumns, link_price: float) -> Masks:
    """The most promising threshold sets (S, M). Times of all (i, j, k) come from running sums per class."""
    problem = layer.problem
    classes = np.split(np.arange(len(layer.experts_M)), [layer.first_arriving, layer.first_absent])
    ranked = [part[np.argsort(-layer.cpu_s_M[part], kind="stable")] for part in classes]
    limits = [np.arange(len(part) + 1) for part in ranked]
    limits[1] = limits[1][:: 1 + (len(limits[1]) - 1) // MAX_ARRIVING_THRESHOLDS]

    def running(values_M: Floats) -> Floats:
        """Sum over the i, j, k most popular, (I+1, J+1, K+1)."""
        sums = [np.append(0.0, values_M[part].cumsum())[limit] for part, limit in zip(ranked, limits, strict=True)]
        return sums[0][:, None, None] + sums[1][None, :, None] + sums[2][None, None, :]

    tokens = layer.tokens_M.sum() - running(layer.tokens_M)
    cpu_end = (
        np.maximum(problem.cpu_backlog_s, tokens * problem.token_d2h_s) + layer.cpu_s_M.sum() - running(layer.cpu_s_M)
    )
    cpu_end = np.where(tokens > 0, cpu_end + tokens * problem.token_h2d_s, 0.0)
    # Work on absent experts that cannot start before the q-th load has landed, for every q.
    work_K = layer.accelerator_s_M[ranked[2]]
    before_K = np.append(0.0, work_K.cumsum())
    landed_K = layer.ready_s_M[ranked[2]] + np.arange(1, len(work_K) + 1) * problem.load_s - before_K[:-1]
    wait_K = np.maximum.accumulate(np.append(0.0, landed_K))
    arrived_J = np.maximum.accumulate(np.append(0.0, layer.ready_s_M[ranked[1]]))[limits[1]]
    accelerator_end = np.maximum(
        np.maximum(problem.accelerator_backlog_s + running(layer.accelerator_s_M), (wait_K + before_K)[None, None, :]),
        arrived_J[None, :, None] + before_K[None, None, :],
    )
    total = limits[0][:, None, None] + limits[1][None, :, None] + limits[2][None, None, :]
    cost = np.maximum(cpu_end, accelerator_end) + link_price * running(layer.link_s_M)
    cost = np.where(total <= problem.max_on_accelerator, cost, np.inf).reshape(-1)
    num_sets = min(NUM_THRESHOLD_SETS, len(cost))
    chosen = np.unravel_index(np.argpartition(cost, num_sets - 1)[:num_sets], total.shape)
    masks = np.zeros((num_sets, len(layer.experts_M)), np.bool_)
    for part, limit, index_S in zip(ranked, limits, chosen, strict=True):
        masks[:, part] = np.arange(len(part))[None, :] < limit[index_S][:, None]
    return masks


def _neighbours(layer: LayerColumns, mask_M: Masks) -> Masks:
    """Every flip of one expert, and up to ``MAX_PAIRS`` flips of two, evenly spread over popularity."""
    num = len(mask_M)
    by_work = np.argsort(-layer.cpu_s_M, kind="stable")
    first, second = np.triu_indices(num, k=1)
    if len(first) > MAX_PAIRS:
        # Of many experts, exchanges between the sides matter most, and near-equal experts stand for one another.
        side = int(MAX_PAIRS**0.5)
        on, off = by_work[mask_M[by_work]], by_work[~mask_M[by_work]]
        on, off = (part[:: max(1, -(-len(part) // side))] for part in (on, off))
        first, second = np.repeat(on, len(off)), np.tile(off, len(on))
    masks = np.tile(mask_M, (num + len(first), 1))
    rows = np.arange(num, len(masks))
    masks[np.arange(num), np.arange(num)] ^= True
    masks[rows, first] ^= True
    masks[rows, second] ^= True
    return masks
