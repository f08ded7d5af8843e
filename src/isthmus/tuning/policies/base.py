"""What every policy shares: costs of a layer's experts, the stages, the popularity seen so far, and when each expert is
wanted next."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from isthmus.planning.loading import Phase
from isthmus.planning.memory import experts_of, most_with_gradients
from isthmus.planning.popularity import blend_history
from isthmus.planning.problem import CostModel, LayerProblem
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import ModelSpec, UnitKey
from isthmus.spec.plan import LayerSplit, Plan
from isthmus.tuning.loader import ExpertLoader
from isthmus.tuning.predictor import PopularityPredictor
from isthmus.tuning.protocols import Policy


@dataclass(slots=True)
class PolicySetup:
    """``num_tokens``: routed tokens of one pass, all its micro-batches together. ``is_pipelined``: every micro-batch is
    a wave and passes through a whole stage by itself: all layers of a stage are in use, and hold gradients, at once."""

    spec: ModelSpec
    costs: CostModel
    plan: Plan
    loader: ExpertLoader
    num_tokens: int
    recorder: Recorder
    predictor: PopularityPredictor | None = None
    is_pipelined: bool = False


class StagedPolicy(Policy):
    """A policy that loads by stages (APTMoE, section 4): subclasses say what to queue and how to split."""

    def __init__(self, setup: PolicySetup) -> None:
        self.setup = setup
        self.num_waves = setup.plan.num_waves
        self.spec = setup.spec
        self.loader = setup.loader
        self.layers = setup.spec.moe_layers
        self.stage_of = {
            layer: number
            for number, stage in enumerate(setup.plan.stages)
            for layer in range(stage.first_layer, stage.last_layer + 1)
        }
        self.stages = [
            [layer for layer in self.layers if self.stage_of[layer] == number]
            for number in range(len(setup.plan.stages))
        ]
        self.history: dict[int, tuple[float, ...]] = {}
        self.counts: dict[int, list[int]] = {}
        stages = setup.plan.stages if setup.is_pipelined else ()
        self._num_gradients = most_with_gradients(experts_of(setup.spec), stages)
        self._lock = threading.RLock()
        self._ready: set[int] = set()
        self._wanted: list[UnitKey] = []
        self._layer = -1
        self._is_backward = False
        self._is_followed = False
        """In backward: whether a forward pass with the same weights comes next."""
        self._forward: dict[int, frozenset[int]] = {}
        self._backward: dict[int, frozenset[int]] = {}
        """Experts wanted on the accelerator, by layer; a layer without entry: all."""
        self._decided: dict[int, LayerSplit] = {}

    # --- costs -----------------------------------------------------------------------------------------------------

    def num_experts(self, layer: int) -> int:
        spec = self.spec.layers[layer]
        assert spec is not None
        return spec.num_experts

    def problem(self, layer: int, counts_E: Sequence[int], *, is_backward: bool, num_parts: int = 1) -> LayerProblem:
        """The layer's problem as it stands now: what is resident, what is on its way. ``num_parts``: waves that share
        the counts."""
        keys = [UnitKey(layer, expert) for expert in range(len(counts_E))]
        resident = frozenset(key.expert for key in keys if self.loader.is_resident(key))
        arriving = {key.expert: self.loader.estimated_wait_s(key) for key in keys if self.loader.is_in_flight(key)}
        return self.setup.costs.problem(
            layer,
            counts_E,
            is_backward=is_backward,
            resident=resident,
            arriving_s=arriving,
            max_on_accelerator=self.most_in_backward(layer) if is_backward else None,
            num_parts=num_parts,
        )

    def most_in_backward(self, layer: int) -> int:
        """Experts of a layer that backward may put on the accelerator.

        Each holds a slot for its gradient until the layer's last wave, while the first wave may be in the next layer
        already, in a pipeline in any of the stage's; one more slot holds weights.
        """
        num_layers = 1 if self.num_waves == 1 else 2
        if self.setup.is_pipelined:
            num_layers = len(self.stages[self.stage_of[layer]])
        return min(self.num_experts(layer), (self.setup.plan.num_slots - 1) // num_layers)

    def expected_counts(self, layer: int) -> list[int]:
        """Historical popularity scaled to a pass's tokens; uniform before the first."""
        spec = self.spec.layers[layer]
        assert spec is not None
        pairs = self.setup.num_tokens * spec.top_k
        shares = self.history.get(layer, (1.0 / spec.num_experts,) * spec.num_experts)
        return [round(share * pairs) for share in shares]

    def learn(self, counts_LE: dict[int, list[int]]) -> None:
        """Takes a pass's real counts into the history (an exponential average over a few passes)."""
        for layer, counts in counts_LE.items():
            self.history[layer] = blend_history(self.history.get(layer), counts)

    def predict_next(self, layer: int, hidden_TH: Tensor, index_Tk: Tensor) -> tuple[int, list[int]] | None:
        """(the MoE layer after ``layer``, its predicted counts); None at the last. Lets the predictor learn from
        ``layer``."""
        predictor = self.setup.predictor
        if predictor is None:
            return None
        predictor.learn(layer, index_Tk)
        following = next((other for other in self.layers if other > layer), None)
        return None if following is None else (following, predictor.predict(following, hidden_TH))

    # --- queues ----------------------------------------------------------------------------------------------------

    def want(self, keys: Iterable[UnitKey]) -> None:
        """Replaces the inter-stage queue. Experts whose new weights are not there yet join when their layer is
        ready."""
        with self._lock:
            self._wanted = list(keys)
            self._queue_wanted()

    def passed(self, layer: int) -> None:
        """Where the layer's experts run in this pass has been decided: what is still queued for it comes too late."""
        with self._lock:
            self._wanted = [key for key in self._wanted if key.layer != layer]
            self._queue_wanted()

    def _queue_wanted(self) -> None:
        self.loader.set_queue(Phase.STAGE, [key for key in self._wanted if key.layer in self._ready])

    def begin_step(self) -> None:
        with self._lock:
            self._ready.clear()
            self._wanted = []
            self._forward, self._backward = {}, {}
            self.loader.num_reserved = 0
            self._is_backward = False
            self._layer = -1
            for phase in Phase:
                self.loader.clear(phase)
            self.loader.invalidate()

    def layer_ready(self, layer: int) -> None:
        with self._lock:
            self._ready.add(layer)
            self._queue_wanted()

    # --- the order of a step -----------------------------------------------------------------------------------------

    def next_use(self, key: UnitKey) -> float:
        last = 2 * self.spec.num_layers - 1
        if self._is_backward:
            is_wanted = key.layer <= self._layer and key.expert in self._backward.get(key.layer, _EVERY)
            if is_wanted:
                return float(last - key.layer)
            return float(last + 1 + key.layer) if self._is_followed else math.inf
        is_wanted = key.layer >= self._layer and key.expert in self._forward.get(key.layer, _EVERY)
        return float(key.layer if is_wanted else last - key.layer)

    def begin_forward(self) -> None:
        self._is_backward = False
        self._layer = -1
        self.loader.num_reserved = 0
        self.plan_forward()

    def enter_forward(self, layer: int) -> None:
        self._enter(layer)

    def begin_backward(self, counts_LE: dict[int, list[int]], *, is_last: bool) -> None:
        self._is_followed = not is_last
        self.learn(counts_LE)
        self.counts = {layer: list(counts) for layer, counts in counts_LE.items()}
        self._is_backward = True
        self._layer = self.spec.num_layers
        self._decided = {}
        self.loader.clear(Phase.LAYER)
        self.loader.clear(Phase.EXPERT)
        self.loader.num_reserved = min(self._num_gradients, self.setup.plan.num_slots // 2)
        self.plan_backward()

    def enter_backward(self, layer: int) -> None:
        self._enter(layer)

    def _enter(self, layer: int) -> None:
        previous, self._layer = self._layer, layer
        stage = self.stage_of[layer]
        if self.setup.is_pipelined:
            # The next micro-batch will come to the stage's first layer again.
            bounds = self.setup.plan.stages[stage]
            self._layer = bounds.last_layer if self._is_backward else bounds.first_layer
        if self.stage_of.get(previous) != stage:
            self.enter_stage(stage)
            if self._is_backward and self._is_followed and not stage:
                # Backward ends where the next forward begins, so all that is here is wanted again before the rest.
                self.want([*self._wanted, *self.first_wanted()])

    def split_backward(self, layer: int) -> LayerSplit:
        if layer not in self._decided:
            self._decided[layer] = self.decide_backward(layer)
        return self._decided[layer]

    def leave_backward(self, layer: int) -> None:
        self._backward[layer] = frozenset()

    # --- what a policy is --------------------------------------------------------------------------------------------

    def plan_forward(self) -> None:
        """Called before a forward pass."""

    def plan_backward(self) -> None:
        """Called before a backward pass, when all counts are known."""

    def first_wanted(self) -> list[UnitKey]:
        """What a forward pass is to find on the accelerator, if the links have time before it begins."""
        return []

    @abstractmethod
    def enter_stage(self, stage: int) -> None:
        """Called when a pass enters a stage."""

    @abstractmethod
    def decide_backward(self, layer: int) -> LayerSplit:
        """Where the layer's experts run in backward."""

    def neighbour(self, stage: int) -> int | None:
        """The stage that runs after ``stage`` in this pass."""
        following = stage - 1 if self._is_backward else stage + 1
        return following if 0 <= following < len(self.stages) else None


_EVERY = frozenset(range(1 << 16))
