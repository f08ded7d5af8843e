"""Our policy: whole passes are planned against the three resources at once, and corrected layer by layer as counts
arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from isthmus.planning.horizon import PassPlan, plan_pass
from isthmus.planning.loading import Phase
from isthmus.planning.problem import LayerProblem
from isthmus.planning.split import split_rule
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.policies.base import PolicySetup, StagedPolicy


class Calibration:
    """How much longer a resource takes in a pass than its profile says: cores and memory are shared with everything
    else.

    ``factor`` is measured ÷ predicted seconds of the lane in the first pass and follows it from then on, within a
    factor of three.
    """

    def __init__(self, lane: str, recorder: Recorder) -> None:
        self.factor = 1.0
        self._weight = 1.0
        self._lane = lane
        self._recorder = recorder
        self._predicted_s = 0.0
        self._busy_s = 0.0

    def open(self) -> None:
        """A pass begins: from here on the lane's work is that of ``predict``."""
        self._busy_s, self._predicted_s = self._recorder.busy_s(self._lane), 0.0

    def predict(self, seconds: float) -> None:
        """Seconds that the pass is expected to keep the lane busy with, at the present factor."""
        self._predicted_s += seconds / self.factor

    def close(self) -> None:
        """The pass is over."""
        if self._predicted_s > 0.0:
            measured = (self._recorder.busy_s(self._lane) - self._busy_s) / self._predicted_s
            followed = (1 - self._weight) * self.factor + self._weight * measured
            self.factor, self._weight = min(3.0, max(1 / 3, followed)), 0.5
        self._predicted_s = 0.0


@dataclass(slots=True)
class PassCalibration:
    """Both computing resources in one of the two passes."""

    cpu: Calibration
    accelerator: Calibration

    @classmethod
    def of(cls, recorder: Recorder) -> PassCalibration:
        return cls(Calibration("cpu_experts", recorder), Calibration("accelerator", recorder))

    def open(self) -> None:
        self.cpu.open()
        self.accelerator.open()

    def close(self) -> None:
        self.cpu.close()
        self.accelerator.close()

    def expect(self, problem: LayerProblem, on_accelerator: tuple[int, ...], on_cpu: tuple[int, ...]) -> None:
        self.cpu.predict(sum(problem.cpu_s[expert] for expert in on_cpu))
        self.accelerator.predict(problem.dense_s + sum(problem.accelerator_s[expert] for expert in on_accelerator))


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
        self._found = {is_backward: PassCalibration.of(setup.recorder) for is_backward in (False, True)}
        self._num_steps = 0

    def begin_step(self) -> None:
        super().begin_step()
        self._found[True].close()
        self._num_steps += 1
        # Popularity changes slowly: this is asked after 1, 2, 4, 8, … steps.
        is_free = self.setup.plan.num_waves > 1 and not self.setup.is_pipelined
        if is_free and self._num_steps & (self._num_steps - 1) == 0:
            self.num_waves = min((1, self.setup.plan.num_waves), key=self._predicted_step_s)

    def _predicted_step_s(self, num_waves: int) -> float:
        """Seconds of both passes of a step like those before. Several waves hide the dense part behind the CPU's
        experts, but pay what an expert costs whatever its tokens as often."""
        counts = {layer: self.expected_counts(layer) for layer in self.layers}
        seconds = 0.0
        for layers, is_backward in ((self.layers, False), (self.layers[::-1], True)):
            problems = self._problems(layers, counts, is_backward=is_backward, num_waves=num_waves)
            plan = plan_pass(problems, num_slots=self.setup.plan.num_slots, num_waves=num_waves)
            seconds += plan.predicted_s
        return seconds

    def problem(self, layer: int, counts_E: Sequence[int], *, is_backward: bool, num_parts: int = 1) -> LayerProblem:
        """As profiled, times what computing has been found to take while everything else runs beside it."""
        problem = super().problem(layer, counts_E, is_backward=is_backward, num_parts=num_parts)
        found = self._found[is_backward]
        return replace(
            problem,
            cpu_s=tuple(found.cpu.factor * seconds for seconds in problem.cpu_s),
            accelerator_s=tuple(found.accelerator.factor * seconds for seconds in problem.accelerator_s),
            dense_s=found.accelerator.factor * problem.dense_s,
        )

    def _problems(
        self, layers: Sequence[int], counts: dict[int, list[int]], *, is_backward: bool, num_waves: int
    ) -> list[LayerProblem]:
        problems = [
            self.problem(layer, counts[layer], is_backward=is_backward, num_parts=num_waves) for layer in layers
        ]
        if is_backward:
            return problems
        return [
            problem if layer in self._ready else replace(problem, optimizer_s=self.setup.costs.optimizer_s(layer))
            for layer, problem in zip(layers, problems, strict=True)
        ]

    def _plan(self, layers: list[int], counts: dict[int, list[int]], *, is_backward: bool) -> PassPlan:
        problems = self._problems(layers, counts, is_backward=is_backward, num_waves=self.num_waves)
        plan = plan_pass(problems, num_slots=self.setup.plan.num_slots, num_waves=self.num_waves)
        self._link_price = plan.link_price
        self.want(UnitKey(layers[position], expert) for position, expert in plan.load_order)
        return plan

    def plan_forward(self) -> None:
        self._found[True].close()  # of the flight before
        self._found[False].open()
        layers = list(self.layers)
        counts = {layer: self.expected_counts(layer) for layer in layers}
        plan = self._plan(layers, counts, is_backward=False)
        self._forward = {layer: frozenset(on) for layer, on in zip(layers, plan.on_accelerator, strict=True)}

    def first_wanted(self) -> list[UnitKey]:
        """As planned for the forward pass that has just been, most popular first; the next one plans anew."""
        return [
            UnitKey(layer, expert)
            for layer in self.layers
            for expert in sorted(self._forward[layer], key=lambda expert: -self.counts[layer][expert])
        ]

    def plan_backward(self) -> None:
        self._found[False].close()
        self._found[True].open()
        layers = list(reversed(self.layers))
        plan = self._plan(layers, self.counts, is_backward=True)
        self._backward = {layer: frozenset(on) for layer, on in zip(layers, plan.on_accelerator, strict=True)}

    def enter_stage(self, stage: int) -> None:
        pass

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        problem = self.problem(layer, counts_E, is_backward=False)
        split = split_rule("affinity")(problem, link_price=self._link_price)
        self._found[False].expect(problem, split.on_accelerator, split.on_cpu)
        self.passed(layer)
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
        problem = self.problem(layer, counts_E, is_backward=True, num_parts=self.num_waves)
        on_accelerator = tuple(expert for expert in range(len(counts_E)) if counts_E[expert] and expert in planned)
        on_cpu = tuple(expert for expert in range(len(counts_E)) if counts_E[expert] and expert not in planned)
        self._found[True].expect(problem, on_accelerator, on_cpu)
        return LayerSplit(on_accelerator=on_accelerator, on_cpu=on_cpu)
