"""The published policy: three loading phases, each with its own popularity, split by Equation 1 (APTMoE, sections 4.2
to 4.4)."""

from __future__ import annotations

from torch import Tensor

from isthmus.planning.equation_one import equation_one_split
from isthmus.planning.loading import Phase, by_rank
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.policies.base import StagedPolicy


class Paper(StagedPolicy):
    """Historical popularity between stages, predicted between layers, real inside a layer; Equation 1 at each."""

    name = "paper"

    def _by_rank(self, stage: int) -> list[UnitKey]:
        """Experts of all layers of the stage, the most popular rank of each layer first (section 4.2)."""
        layers = self.stages[stage][::-1] if self._is_backward else self.stages[stage]
        counts = {layer: self.counts[layer] if self._is_backward else self.expected_counts(layer) for layer in layers}
        return by_rank(counts)

    def _equation_1(self, layer: int, counts_E: list[int], *, is_backward: bool) -> LayerSplit:
        most = self.most_in_backward(layer) if is_backward else None
        return equation_one_split(self.problem(layer, counts_E, is_backward=is_backward), at_most=most)

    def plan_forward(self) -> None:
        self.want(self.first_wanted())

    def first_wanted(self) -> list[UnitKey]:
        return by_rank({layer: self.expected_counts(layer) for layer in self.stages[0]})

    def plan_backward(self) -> None:
        self._backward = {
            layer: frozenset(self._equation_1(layer, self.counts[layer], is_backward=True).on_accelerator)
            for layer in self.layers
        }

    def enter_stage(self, stage: int) -> None:
        following = self.neighbour(stage)
        if self._is_backward:
            stages = [stage] if following is None else [stage, following]
            self.want(
                key for number in stages for key in self._by_rank(number) if key.expert in self._backward[key.layer]
            )
        else:
            self.want(self._by_rank(following) if following is not None else [])

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        split = self._equation_1(layer, counts_E, is_backward=False)
        self.loader.set_queue(Phase.EXPERT, [UnitKey(layer, expert) for expert in split.load_order])
        self.look_ahead(layer, hidden_TH, index_Tk)
        return split

    def look_ahead(self, layer: int, hidden_TH: Tensor, index_Tk: Tensor) -> None:
        """The inter-layer phase: what Equation 1 gives to the accelerator for the predicted counts of the next
        layer."""
        predicted = self.predict_next(layer, hidden_TH, index_Tk)
        if predicted is None or predicted[0] not in self._ready:
            self.loader.clear(Phase.LAYER)
            return
        following, counts_E = predicted
        split = self._equation_1(following, counts_E, is_backward=False)
        self.loader.set_queue(Phase.LAYER, [UnitKey(following, expert) for expert in split.load_order])

    def decide_backward(self, layer: int) -> LayerSplit:
        return self._equation_1(layer, self.counts[layer], is_backward=True)
