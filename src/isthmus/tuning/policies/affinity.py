"""Our policy: whole passes are planned against the three resources at once, and corrected layer by layer as counts
arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from isthmus.planning.horizon import PassPlan, plan_pass
from isthmus.planning.problem import LayerProblem
from isthmus.planning.split import split_rule
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.loader import Phase
from isthmus.tuning.policies.base import PolicySetup, StagedPolicy


class Calibration:
    """How much longer a resource takes in a step than its profile says: cores and memory are shared with everything
    else.

    ``factor`` follows measured ÷ predicted seconds of the lane, step by step, within a factor of three.
    """

    def __init__(self, lane: str, recorder: Recorder) -> None:
        self.factor = 1.0
        self._lane = lane
        self._recorder = recorder
        self._predicted_s = 0.0
        self._busy_s = recorder.busy_s(lane)

    def predict(self, seconds: float) -> None:
        """Seconds that the present step is expected to keep the lane busy with, at the present factor."""
        self._predicted_s += seconds / self.factor

    def close_step(self) -> None:
        busy_s = self._recorder.busy_s(self._lane)
        if self._predicted_s > 0.0:
            measured = (busy_s - self._busy_s) / self._predicted_s
            self.factor = min(3.0, max(1 / 3, 0.5 * self.factor + 0.5 * measured))
        self._busy_s, self._predicted_s = busy_s, 0.0


class Affinity(StagedPolicy):
    """Same three phases as the published system, another rule: minimise the makespan of CPU, link and accelerator.

    Between stages, ``plan_pass`` decides for the pass as a whole (historical counts in forward, real ones in backward),
    in order of need. Its price of a second on the link then guides the decisions inside a layer, so that loading one
    more expert here is weighed against what the same transfer would save later.
    """

    name = "affinity"

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self._link_price = 0.0
        self._cpu = Calibration("cpu_experts", setup.recorder)
        self._accelerator = Calibration("accelerator", setup.recorder)

    def begin_step(self) -> None:
        super().begin_step()
        self._cpu.close_step()
        self._accelerator.close_step()

    def problem(self, layer: int, counts_E: Sequence[int], *, is_backward: bool, num_parts: int = 1) -> LayerProblem:
        """As profiled, times what computing has been found to take while everything else runs beside it."""
        problem = super().problem(layer, counts_E, is_backward=is_backward, num_parts=num_parts)
        return replace(
            problem,
            cpu_s=tuple(self._cpu.factor * seconds for seconds in problem.cpu_s),
            accelerator_s=tuple(self._accelerator.factor * seconds for seconds in problem.accelerator_s),
            dense_s=self._accelerator.factor * problem.dense_s,
        )

    def _plan(self, layers: list[int], counts: dict[int, list[int]], *, is_backward: bool) -> PassPlan:
        num_waves = self.setup.plan.num_waves
        problems = [
            self.problem(layer, counts[layer], is_backward=is_backward, num_parts=num_waves) for layer in layers
        ]
        plan = plan_pass(problems, num_slots=self.setup.plan.num_slots, num_waves=num_waves)
        self._link_price = plan.link_price
        self.want(UnitKey(layers[position], expert) for position, expert in plan.load_order)
        return plan

    def plan_forward(self) -> None:
        layers = list(self.layers)
        counts = {layer: self.expected_counts(layer) for layer in layers}
        plan = self._plan(layers, counts, is_backward=False)
        self._forward = {layer: frozenset(on) for layer, on in zip(layers, plan.on_accelerator, strict=True)}

    def plan_backward(self) -> None:
        layers = list(reversed(self.layers))
        plan = self._plan(layers, self.counts, is_backward=True)
        self._backward = {layer: frozenset(on) for layer, on in zip(layers, plan.on_accelerator, strict=True)}

    def enter_stage(self, stage: int) -> None:
        pass

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        problem = self.problem(layer, counts_E, is_backward=False)
        split = split_rule("affinity")(problem, link_price=self._link_price)
        self._expect(problem, split.on_accelerator, split.on_cpu)
        self.loader.set_queue(Phase.EXPERT, [UnitKey(layer, expert) for expert in split.load_order])
        predicted = self.predict_next(layer, hidden_TH, index_Tk)
        if predicted is not None and predicted[0] in self._ready:
            following, expected_E = predicted
            problem = self.problem(following, expected_E, is_backward=False)
            ahead = split_rule("affinity")(problem, link_price=self._link_price)
            self.loader.set_queue(Phase.LAYER, [UnitKey(following, expert) for expert in ahead.load_order])
        return split

    def decide_backward(self, layer: int) -> LayerSplit:
        """As planned for the whole pass: its counts were real, so nothing has been learnt since."""
        counts_E, planned = self.counts[layer], self._backward[layer]
        problem = self.problem(layer, counts_E, is_backward=True, num_parts=self.setup.plan.num_waves)
        on_accelerator = tuple(expert for expert in range(len(counts_E)) if counts_E[expert] and expert in planned)
        on_cpu = tuple(expert for expert in range(len(counts_E)) if counts_E[expert] and expert not in planned)
        self._expect(problem, on_accelerator, on_cpu)
        return LayerSplit(on_accelerator=on_accelerator, on_cpu=on_cpu)

    def _expect(self, problem: LayerProblem, on_accelerator: tuple[int, ...], on_cpu: tuple[int, ...]) -> None:
        self._cpu.predict(sum(problem.cpu_s[expert] for expert in on_cpu))
        self._accelerator.predict(problem.dense_s + sum(problem.accelerator_s[expert] for expert in on_accelerator))
