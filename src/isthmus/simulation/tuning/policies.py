"""Who decides in a simulated step: what is loaded when, and where experts run. The rules themselves are those of the
runtime (``planning``).

``gpipe``: everything stays on the accelerators, the optimizer too. ``gpipe-offload``: a stage is loaded when the one
before has left its device. ``mobius``: the next stage is loaded while one runs (Feng et al., ASPLOS 2023).
``cpu-experts``: every expert is computed on the CPU, as KTransformers does.
``aptmoe``: three phases, Equation 1 (APTMoE, sections 4.2 to 4.4). ``affinity``: ours, see ``candidates.py``.

The published ones copy units whole, hold two stages, and end a step with its last optimizer step. Our runtime copies in
pieces, holds what fits, and steps layers while the next step's forward runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from isthmus.planning.alike import AlikeLayers, cheapest_of_each, equation_one_of_each
from isthmus.planning.loading import in_turn, unit_key
from isthmus.planning.popularity import blend_history
from isthmus.simulation.tuning.work import BACKWARD, FORWARD, Run, StepWork
from isthmus.spec.model import DENSE, UnitKey

PIECE_BYTES = 16 << 20
"""That long copies are queued in (``tuning/accelerator/cuda.py``)."""
Counts = Mapping[int, Sequence[float]]


class History:
    """Popularity seen so far; before the first step all experts are taken for equally popular."""

    def __init__(self) -> None:
        self._shares: dict[int, tuple[float, ...]] = {}

    def learn(self, counts: Counts) -> None:
        for layer, counts_E in counts.items():
            self._shares[layer] = blend_history(self._shares.get(layer), [*map(round, counts_E)])

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

    is_resident = False
    waits_for_stage = False
    """Whether a stage begins only when all of it has been loaded."""
    looks_ahead = False
    """Whether it predicts the next layer's counts (inter-layer phase)."""
    decides_again = False
    """Whether in forward every micro-batch is divided anew, by what has landed meanwhile."""
    piece_bytes = 0
    """Longer copies let what a computation waits for go first after so many bytes; 0: after each unit."""
    overlaps_steps = False
    """Whether the optimizer steps layers while the next step's forward runs, a layer's weights waiting for its step.
    The next step begins when all gradients are there: they are clipped to a norm of all."""

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
        keys = [unit_key(layer, DENSE) for layer in run.layers]
        for layer in run.layers:
            keys += self.work.expert_keys(layer, range(self.num_experts(layer)))
        return keys

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


class CpuExperts(StepPolicy):
    """Experts stay on the CPU; the rest is loaded a stage ahead."""

    def num_experts(self, layer: int) -> int:
        """That are loaded, and computed on the accelerator."""
        return 0


class Aptmoe(StepPolicy):
    """As published."""

    looks_ahead = True
    decides_again = True
    uses_what_is_there = True
    """Whether in backward an expert that is on the accelerator is computed there, whatever was decided."""

    def __init__(self, work: StepWork, expected: Counts) -> None:
        super().__init__(work, expected)
        self._chosen: dict[bool, dict[int, frozenset[int]]] = {}
        self._predicted: dict[int, list[int]] = {}
        self._ranked: dict[int, list[int]] = {}
        """Experts by history, the most popular first."""
        self._queues: dict[tuple[int, bool], list[UnitKey]] = {}

    def choose(self, layers: AlikeLayers, is_backward: bool) -> list[frozenset[int]]:
        """Experts of each layer that belong on the accelerator."""
        return equation_one_of_each(layers)

    def choose_all(self, counts: Counts, is_backward: bool) -> dict[int, frozenset[int]]:
        """Likewise, by layer."""
        found: dict[int, frozenset[int]] = {}
        for costs, layers in self.work.alike(counts):
            priced = costs.alike([counts[layer] for layer in layers], is_backward=is_backward)
            found.update(zip(layers, self.choose(priced, is_backward), strict=True))
        return found

    def chosen(self, layer: int, is_backward: bool) -> frozenset[int]:
        """Likewise, with the step's real counts."""
        if is_backward not in self._chosen:
            self._chosen[is_backward] = self.choose_all(self.work.counts, is_backward)
        return self._chosen[is_backward][layer]

    def stage_queue(self, runs: Sequence[Run], at: int) -> list[UnitKey]:
        held = self.held(runs, at)
        if not runs[at].is_backward and at:
            held = held[1:]  # what is left of this stage's queue is dropped
        return [*chain.from_iterable(map(self._run_queue, held))]

    def _run_queue(self, run: Run) -> list[UnitKey]:
        at = (run.stage, run.is_backward)
        if at not in self._queues:
            experts = self._backward_queue(run) if run.is_backward else self._forward_queue(run)
            self._queues[at] = [*(unit_key(layer, DENSE) for layer in run.layers), *experts]
        return self._queues[at]

    def _backward_queue(self, run: Run) -> list[UnitKey]:
        """What was decided, the most popular rank of all layers first."""
        chosen = {layer: self.chosen(layer, True) for layer in run.layers if layer in self.work.counts}
        ranked = in_turn({layer: self.work.tables[layer].by_work for layer in chosen})
        return [key for key in ranked if key[1] in chosen[key[0]]]

    def _forward_queue(self, run: Run) -> list[UnitKey]:
        """All experts, by history."""
        if not self._ranked:
            for _, layers in self.work.alike(self.expected):
                order_LE = np.argsort(-np.array([self.expected[at] for at in layers]), axis=1, kind="stable")
                self._ranked.update(zip(layers, order_LE.tolist(), strict=True))
        return in_turn({layer: self._ranked[layer] for layer in run.layers if layer in self._ranked})

    def divide(self, layer: int, is_backward: bool, there: Sequence[int]) -> tuple[Iterable[int], Sequence[int]]:
        chosen, here = self.chosen(layer, is_backward), frozenset(there)
        by_work = self.work.tables[layer].by_work
        on = chosen | here if self.uses_what_is_there or not is_backward else chosen
        return on, [expert for expert in by_work if expert in chosen and expert not in here]

    def predict(self, layer: int) -> Sequence[int]:
        """With the predictor's accuracy: that share of tokens as they will be, the rest as history has them."""
        if not self._predicted:
            accuracy, counts = self.work.costs.job.predictor_accuracy, {}
            for at, real in self.work.counts.items():
                past = self.expected[at]
                counts[at] = [accuracy * now + (1 - accuracy) * then for now, then in zip(real, past, strict=True)]
            for at, chosen in self.choose_all(counts, False).items():
                popularity = counts[at]
                self._predicted[at] = sorted(chosen, key=lambda expert: (-popularity[expert], expert))
        return self._predicted[layer]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What our policy weighs; ``candidates.py`` tries some."""

    cpu_weight: float = 1.0
    """What a second of the cores counts for beside one of the accelerator: a micro-batch waits for them, and for its
    tokens to go there and back."""
    link_price: float | None = None
    """Seconds that a layer of forward must save for a second of link time to be well spent. None: Equation 1."""
    least_worth: float = 0.0
    """Experts that would take the cores less than so many loads are not loaded ahead in forward."""
    uses_what_is_there: bool = False
    """As in ``Aptmoe``."""

    def __str__(self) -> str:
        price = "Equation 1" if self.link_price is None else f"link price {self.link_price:g}"
        there = ", what is there used" if self.uses_what_is_there else ""
        return f"forward by {price}, loads worth {self.least_worth:g}, cores weigh {self.cpu_weight:g}{there}"


class InOurRuntime:
    """Copies in pieces, and steps layers in the next step's forward."""

    piece_bytes = PIECE_BYTES
    overlaps_steps = True


class RuntimeMobius(InOurRuntime, Mobius):
    """Mobius in our runtime."""


class RuntimeAptmoe(InOurRuntime, Aptmoe):
    """The published rule in our runtime."""


class Affinity(RuntimeAptmoe):
    """Ours. In forward the published phases, with loads that are worth it; in backward, which knows all counts, the
    split with which cores and accelerator end together."""

    def __init__(self, work: StepWork, expected: Counts, mix: Mix) -> None:
        super().__init__(work, expected)
        self._mix = mix
        self.uses_what_is_there = mix.uses_what_is_there
        stage_bytes = self.work.costs.stage_bytes
        self._bytes = [stage_bytes(stage.first_layer, stage.last_layer) for stage in work.stages]
        self._fits = [self._fitting_bytes(device) for device in range(len(work.order))]
        self._held: dict[tuple[int, int], list[Run]] = {}
        self._worthy: dict[int, frozenset[int]] = {}

    def decisions(self) -> tuple[object, ...]:
        """All that its mix decides: with the same of them a step has the same schedule."""
        layers, runs = list(self.work.tables), [run for of_device in self.work.runs for run in of_device]
        looks_on = any(len(run.layers) > 1 for run in runs)
        return (
            self.uses_what_is_there,
            [self.chosen(layer, is_backward) for is_backward in (FORWARD, BACKWARD) for layer in layers],
            [self.predict(layer) for layer in layers if looks_on],
            [self._run_queue(run) for run in runs],
        )

    def _fitting_bytes(self, device: int) -> int:
        """Of weights, beside activations and the gradients of a stage."""
        costs, runs = self.work.costs, self.work.runs[device]
        forward = [run for run in runs if not run.is_backward]
        widest = max(self._bytes[run.stage] for run in forward)
        kept = costs.activation_bytes(sum(len(run.layers) for run in forward))
        return costs.seats[device].host.accelerator.memory_bytes - kept - widest

    def held(self, runs: Sequence[Run], at: int) -> list[Run]:
        """As many stages as fit, those that are needed first."""
        device = self.work.device_of[runs[at].stage]
        if (device, at) not in self._held:
            left = self._fits[device]
            found: dict[int, Run] = {}
            for run in runs[at:]:
                if run.stage not in found:
                    left -= self._bytes[run.stage]
                    if left < 0 and len(found) >= 2:
                        break
                    found[run.stage] = run
            self._held[device, at] = list(found.values())
        return self._held[device, at]

    def choose(self, layers: AlikeLayers, is_backward: bool) -> list[frozenset[int]]:
        price = 0.0 if is_backward else self._mix.link_price
        if price is None:
            return super().choose(layers, is_backward)
        return cheapest_of_each(layers, price, cpu_weight=self._mix.cpu_weight)

    def _forward_queue(self, run: Run) -> list[UnitKey]:
        ranked = super()._forward_queue(run)
        if not self._mix.least_worth:
            return ranked
        worthy = {layer: self._worth(layer) for layer in run.layers if layer in self.expected}
        return [key for key in ranked if key[1] in worthy[key[0]]]

    def _worth(self, layer: int) -> frozenset[int]:
        """Experts that are worth a load, as far as history knows."""
        if not self._worthy:
            self._worthy = self.choose_all(self.expected, False)
            for costs, layers in self.work.alike(self.expected):
                least_s = self._mix.least_worth * costs.load_s
                priced = costs.alike([self.expected[at] for at in layers], is_backward=False)
                for at, cpu_s_E in zip(layers, priced.cpu_s_LE, strict=True):
                    self._worthy[at] |= frozenset(np.flatnonzero(cpu_s_E > least_s).tolist())
        return self._worthy[layer]
