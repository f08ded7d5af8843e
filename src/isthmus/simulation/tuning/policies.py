"""Who decides in a simulated step: what is loaded when, and where experts run. The rules themselves are those of the
runtime (``planning``).

``gpipe``: everything stays on the accelerators, the optimizer too. ``gpipe-offload``: a stage is loaded when the one
before has left its device. ``mobius``: the next stage is loaded while one runs (Feng et al., ASPLOS 2023).
``aptmoe``: three phases, Equation 1 (APTMoE, sections 4.2 to 4.4). ``affinity``: ours, see ``candidates.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from isthmus.planning.equation_one import equation_one_experts
from isthmus.planning.loading import by_rank
from isthmus.planning.popularity import blend_history
from isthmus.planning.split import split_rule
from isthmus.simulation.tuning.work import LayerTables, Run, StepWork
from isthmus.spec.model import UnitKey

Counts = Mapping[int, Sequence[float]]


class History:
    """Popularity seen so far; before the first step all experts are taken for equally popular."""

    def __init__(self) -> None:
        self._shares: dict[int, tuple[float, ...]] = {}

    def learn(self, counts: Counts) -> None:
        for layer, counts_E in counts.items():
            self._shares[layer] = blend_history(self._shares.get(layer), [round(count) for count in counts_E])

    def expected(self, counts: Counts) -> dict[int, list[float]]:
        """What history expects of a step with as many tokens as ``counts``."""
        found = {}
        for layer, counts_E in counts.items():
            total = sum(counts_E)
            shares = self._shares.get(layer, (1 / len(counts_E),) * len(counts_E))
            found[layer] = [share * total for share in shares]
        return found


class StepPolicy:
    """Decides during one step. ``work``: the step as it really is; ``expected``: counts as history has them."""

    interleaves = False
    """Whether a device goes on with another micro-batch while one waits for the CPU."""
    is_resident = False
    waits_for_stage = False
    """Whether a stage begins only when all of it has been loaded."""
    looks_ahead = False
    """Whether it predicts the next layer's counts (inter-layer phase)."""
    decides_again = False
    """Whether in forward every micro-batch is divided anew, by what has landed meanwhile."""

    def __init__(self, work: StepWork, expected: Counts) -> None:
        self.work = work
        self.expected = expected

    def held(self, runs: Sequence[Run], at: int) -> list[Run]:
        """The runs whose stages may be on the accelerator while run ``at`` is: it and the next that needs another."""
        others = [run for run in runs[at + 1 :] if run.stage != runs[at].stage]
        return [runs[at], *others[:1]]

    def stage_queue(self, runs: Sequence[Run], at: int) -> list[UnitKey]:
        """What is to be loaded from the moment run ``at`` begins, most urgent first."""
        return [key for run in self.held(runs, at) for key in self.run_keys(run)]

    def run_keys(self, run: Run) -> list[UnitKey]:
        """Dense parts first, then experts layer by layer."""
        keys = [self.work.dense_key(layer) for layer in run.layers]
        for layer in run.layers:
            keys += self.work.expert_keys(layer, self.wanted(layer, run.is_backward))
        return keys

    def wanted(self, layer: int, is_backward: bool) -> Iterable[int]:
        """Experts that are to be loaded for the layer, most urgent first."""
        return range(self.num_experts(layer))

    def num_experts(self, layer: int) -> int:
        expert = self.work.costs.spec.layers[layer]
        return 0 if expert is None else expert.num_experts

    def divide(self, layer: int, is_backward: bool, there: Sequence[int]) -> tuple[Iterable[int], Sequence[int]]:
        """(experts on the accelerator, those of them to be loaded at once). ``there``: landed or on their way."""
        return range(self.num_experts(layer)), ()

    def predict(self, layer: int) -> Sequence[int]:
        """Experts of the next layer to be loaded ahead, most urgent first."""
        return ()


class GPipe(StepPolicy):
    is_resident = True


class GPipeOffload(StepPolicy):
    waits_for_stage = True

    def held(self, runs: Sequence[Run], at: int) -> list[Run]:
        return [runs[at]]


class Mobius(StepPolicy):
    waits_for_stage = True


class Aptmoe(StepPolicy):
    """As published."""

    looks_ahead = True
    decides_again = True

    def __init__(self, work: StepWork, expected: Counts) -> None:
        super().__init__(work, expected)
        self._chosen: dict[tuple[int, bool, bool], frozenset[int]] = {}

    def _equation_1(self, layer: int, counts_E: Sequence[float], is_backward: bool, is_real: bool) -> frozenset[int]:
        key = (layer, is_backward, is_real)
        if key not in self._chosen:
            problem = self.work.layer_costs(layer).problem(counts_E, is_backward=is_backward)
            self._chosen[key] = equation_one_experts(problem)
        return self._chosen[key]

    def stage_queue(self, runs: Sequence[Run], at: int) -> list[UnitKey]:
        held = self.held(runs, at)
        if not runs[at].is_backward and at:
            held = held[1:]  # what is left of this stage's queue is dropped
        keys: list[UnitKey] = []
        for run in held:
            keys += [self.work.dense_key(layer) for layer in run.layers]
            if run.is_backward:
                ranked = by_rank({layer: self.work.counts[layer] for layer in run.layers if layer in self.work.counts})
                keys += [key for key in ranked if key.expert in self._real(key.layer, True)]
            else:
                keys += by_rank({layer: self.expected[layer] for layer in run.layers if layer in self.expected})
        return keys

    def _real(self, layer: int, is_backward: bool) -> frozenset[int]:
        return self._equation_1(layer, self.work.counts[layer], is_backward, True)

    def divide(self, layer: int, is_backward: bool, there: Sequence[int]) -> tuple[Iterable[int], Sequence[int]]:
        chosen = self._real(layer, is_backward)
        here = set(there)
        by_work = self.work.tables[layer].by_work
        return chosen | here, [expert for expert in by_work if expert in chosen and expert not in here]

    def predict(self, layer: int) -> Sequence[int]:
        """With the predictor's accuracy: that share of tokens as they will be, the rest as history has them."""
        accuracy = self.work.costs.job.predictor_accuracy
        real, past = self.work.counts[layer], self.expected[layer]
        counts = [accuracy * now + (1 - accuracy) * then for now, then in zip(real, past, strict=True)]
        chosen = self._equation_1(layer, counts, False, False)
        return sorted(chosen, key=lambda expert: (-counts[expert], expert))


class Overtaking(Aptmoe):
    """The published rule where a device goes on with another micro-batch while one waits for the CPU."""

    interleaves = True


class Planned(StepPolicy):
    """As a plan says, made for the expected counts; where counts turn out otherwise, the runtime's split rule decides
    given what is there."""

    interleaves = True

    def __init__(self, work: StepWork, expected: Counts, plan: Mapping[tuple[int, bool], Sequence[int]], factor: float):
        """``plan``: experts on the accelerator by (layer, is_backward), most urgent first. ``factor``: what a second of
        link time counts for in a split."""
        super().__init__(work, expected)
        self._plan = plan
        self._factor = factor

    def wanted(self, layer: int, is_backward: bool) -> Iterable[int]:
        return self._plan.get((layer, is_backward), ())

    def divide(self, layer: int, is_backward: bool, there: Sequence[int]) -> tuple[Iterable[int], Sequence[int]]:
        planned = self._plan[layer, is_backward]
        if is_same(self.work.counts[layer], self.expected[layer]):
            return planned, [expert for expert in planned if expert not in there]
        on = real_split(self.work.tables[layer], is_backward, there, self._factor)
        return on, [expert for expert in on if expert not in there]


def is_same(counts_E: Sequence[float], expected_E: Sequence[float]) -> bool:
    """Up to half a token."""
    return all(abs(a - b) < 1 for a, b in zip(counts_E, expected_E, strict=True))


def real_split(tables: LayerTables, is_backward: bool, there: Sequence[int], factor: float) -> list[int]:
    """``affinity`` with the layer's real counts, given what is there, most work first."""
    from dataclasses import replace

    problem = tables.costs.problem(tables.counts, is_backward=is_backward, load_factor=factor)
    split = split_rule("affinity")(replace(problem, resident=frozenset(there)))
    on = set(split.on_accelerator)
    return [expert for expert in tables.by_work if expert in on]
