"""Policies that compute every expert on the accelerator and load whole stages: Mobius, GPipe with offload, all
resident."""

from __future__ import annotations

from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.policies.base import PolicySetup, StagedPolicy


class Mobius(StagedPolicy):
    """Loads the next stage, all its experts, while the present one runs (Feng et al., ASPLOS 2023)."""

    name = "mobius"

    def __init__(self, setup: PolicySetup) -> None:
        super().__init__(setup)
        self.num_waves = 1  # the CPU computes nothing that could be overlapped

    def stage_keys(self, stage: int) -> list[UnitKey]:
        layers = reversed(self.stages[stage]) if self._is_backward else self.stages[stage]
        return [UnitKey(layer, expert) for layer in layers for expert in range(self.num_experts(layer))]

    def plan_forward(self) -> None:
        self.want(self.stage_keys(0))

    def first_wanted(self) -> list[UnitKey]:
        return [UnitKey(layer, expert) for layer in self.stages[0] for expert in range(self.num_experts(layer))]

    def enter_stage(self, stage: int) -> None:
        following = self.neighbour(stage)
        self.want(self.stage_keys(stage) + (self.stage_keys(following) if following is not None else []))

    def everything(self, counts_E: list[int]) -> LayerSplit:
        return LayerSplit(on_accelerator=tuple(range(len(counts_E))), on_cpu=())

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        return self.everything(counts_E)

    def decide_backward(self, layer: int) -> LayerSplit:
        return self.everything(self.counts[layer])


class GPipeOffload(Mobius):
    """Loads a stage when it starts, without looking ahead: GPipe with its weights kept on the host."""

    name = "gpipe-offload"

    def first_wanted(self) -> list[UnitKey]:
        return []

    def enter_stage(self, stage: int) -> None:
        self.want(self.stage_keys(stage))


class Resident(Mobius):
    """Keeps every expert on the accelerator; loads each once per step, since its weights changed."""

    name = "resident"

    def plan_forward(self) -> None:
        self.want(key for stage in range(len(self.stages)) for key in self.stage_keys(stage))

    def enter_stage(self, stage: int) -> None:
        pass


class CpuExperts(StagedPolicy):
    """Computes every routed expert on the CPU and loads none, as KTransformers does."""

    name = "cpu-experts"

    def enter_stage(self, stage: int) -> None:
        pass

    def nothing(self, counts_E: list[int]) -> LayerSplit:
        return LayerSplit(on_accelerator=(), on_cpu=tuple(range(len(counts_E))))

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        return self.nothing(counts_E)

    def decide_backward(self, layer: int) -> LayerSplit:
        return self.nothing(self.counts[layer])
