"""APTMoE's published figures (SC 2024, section 5) and the same simulated.

Where the paper gives a range over rising skewness, its ends stand for the least and the greatest. Not published, and
the same for all rows: sequences of 64 tokens (the artifact has 128, the paper says nothing), two stages for each
accelerator, S-64's skewness in the scaling rows and a batch that grows there, and what ``clusters.py`` calls not
published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.simulation.tuning.bound import bubble_factor, norm_bound_s, step_bound_s
from isthmus.simulation.tuning.candidates import choose, steady_step
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.mapping import other_mappings, stages_for
from isthmus.simulation.tuning.policies import Aptmoe, GPipeOffload, Mobius, RuntimeAptmoe, StepPolicy
from isthmus.simulation.tuning.popularity import DrawnPopularity
from isthmus.simulation.tuning.shapes import MOE_SHAPES
from isthmus.simulation.tuning.work import StepWork
from isthmus.spec.tune_cluster import TuneCluster

SEQ_LEN = 64
SCALING_SKEWNESS = 0.1

ClusterOf = Callable[[int, int], TuneCluster]
"""(accelerators at one processor, accelerators in all) -> cluster."""


@dataclass(frozen=True)
class Cell:
    """One configuration of the evaluation."""

    model: str
    skewness: float
    at_one_processor: int = 2
    num_devices: int = 4

    @property
    def batch(self) -> int:
        """As published of four accelerators; micro-batches stay as large where there are more."""
        return (16 if self.model.startswith("L") else 32) * self.num_devices

    @property
    def name(self) -> str:
        return f"{self.model} C1+G{self.at_one_processor} G={self.skewness:g} × {self.num_devices}"


@dataclass(frozen=True)
class CellSeconds:
    """What a step takes in a cell, popularity being as before."""

    gpipe_offload_s: float
    mobius_s: float
    aptmoe_s: float
    best_aptmoe_s: float
    """The rule with the number of stages that suits it best."""
    runtime_aptmoe_s: float
    """Likewise in our runtime."""
    affinity_s: float
    bound_s: float
    """Without the pipeline's bubble factor."""
    bubble_factor: float
    norm_bound_s: float
    """Of steps that wait for the norm of all gradients, as ours and ``runtime_aptmoe_s`` do."""
    filled_bound_s: float
    """Likewise, with the pipeline's filling and draining."""
    plan: str


@dataclass(frozen=True)
class Figure:
    """One published ratio: of throughputs, so of step times the other way round."""

    what: str
    """``mobius ÷ gpipe-offload``, ``rule ÷ mobius``, or ``rule ÷ 4 accelerators``, of sequences a second."""
    cell: Cell
    published: float


def _figures() -> tuple[Figure, ...]:
    models = (
        ("S-8", 10.58 / 9.25, (0.2, 0.8), (1.27, 1.32)),
        ("S-16", 8.80 / 8.13, (0.1, 0.4), (1.25, 1.33)),
        ("S-64", 3.23 / 2.85, (0.05, 0.2), (1.17, 1.29)),
        ("M-8", 5.13 / 4.51, (0.2, 0.8), (1.02, 1.17)),
        ("M-16", 3.48 / 3.33, (0.1, 0.4), (1.05, 1.15)),
        ("L-8", 1.15 / 1.01, (0.2, 0.8), (1.05, 1.10)),
    )
    found = []
    for model, offload, skews, rules in models:
        found.append(Figure("mobius ÷ gpipe-offload", Cell(model, skews[0]), offload))
        found += [Figure("rule ÷ mobius", Cell(model, g), rule) for g, rule in zip(skews, rules, strict=True)]
    topologies = (("S-16", 0.3, (0.98, 1.283, 1.31)), ("M-8", 0.6, (0.91, 1.159, 1.258)))
    for model, g, rules in topologies:
        found += [Figure("rule ÷ mobius", Cell(model, g, at), rule) for at, rule in zip((4, 2, 1), rules, strict=True)]
    for num_devices, rate in ((8, 1.65), (16, 3.08)):
        found.append(Figure("rule ÷ 4 accelerators", Cell("S-64", SCALING_SKEWNESS, 2, num_devices), rate))
    return tuple(found)


FIGURES = _figures()
CELLS = tuple(dict.fromkeys([*(figure.cell for figure in FIGURES), Cell("S-64", SCALING_SKEWNESS)]))
"""Every configuration once, that of four accelerators of the scaling rows too."""


def simulate_cell(cell: Cell, cluster: TuneCluster) -> CellSeconds:
    """All policies in one cell."""
    spec = MOE_SHAPES[cell.model]
    job = TuneJob(batch=cell.batch, seq_len=SEQ_LEN, num_micro_batches=cell.num_devices)
    costs = Costs(spec, cluster, job)
    popularity = DrawnPopularity(spec, cell.skewness, is_capped=False)
    counts = {layer: counts_E.tolist() for layer, counts_E in next(popularity.steps(job.num_tokens)).items()}
    stages, order = stages_for(costs, None), costs.order
    works = [StepWork(costs, mapped, order, counts) for mapped in (stages, *other_mappings(costs, stages))]

    def seconds(policy: type[StepPolicy]) -> list[float]:
        return [steady_step(work, policy).seconds for work in works]

    rule = seconds(Aptmoe)
    choice = choose(works[0], [work.stages for work in works[1:]])
    ours = StepWork(costs, choice.stages, order, counts)
    return CellSeconds(
        gpipe_offload_s=steady_step(works[0], GPipeOffload).seconds,
        mobius_s=steady_step(works[0], Mobius).seconds,
        aptmoe_s=rule[0],
        best_aptmoe_s=min(rule),
        runtime_aptmoe_s=min(seconds(RuntimeAptmoe)),
        affinity_s=choice.predicted_s,
        bound_s=step_bound_s(ours),
        bubble_factor=bubble_factor(job.num_micro_batches, len(choice.stages), len(order)),
        norm_bound_s=norm_bound_s(ours),
        filled_bound_s=norm_bound_s(ours, fills=True),
        plan=choice.name,
    )


def simulated_ratio(figure: Figure, cells: dict[Cell, CellSeconds]) -> float:
    """The same ratio as simulated."""
    seconds = cells[figure.cell]
    if figure.what == "mobius ÷ gpipe-offload":
        return seconds.gpipe_offload_s / seconds.mobius_s
    if figure.what == "rule ÷ mobius":
        return seconds.mobius_s / seconds.aptmoe_s
    four = Cell(figure.cell.model, figure.cell.skewness, figure.cell.at_one_processor)
    return figure.cell.batch / seconds.aptmoe_s * cells[four].aptmoe_s / four.batch
