"""Seconds of everything that a process of a run computes and sends, by a profile.

Legend: ``T`` tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.planning.curves import evaluate
from isthmus.planning.problem import expert_times
from isthmus.spec.model import ModelSpec
from isthmus.spec.profile import Curve, ExpertTimes, Profile

MESSAGE_S = 2e-4
"""Of a core: what one tensor takes to send or to receive between processes (gloo, and the engine's part of it)."""
MESSAGE_BYTES_PER_S = 2e9
"""At which gloo moves a tensor between processes of one host, both ends together."""


@dataclass(frozen=True)
class Costs:
    """Of a model's blocks; seconds of cores at work alone."""

    profile: Profile
    spec: ModelSpec
    """Of the whole model."""

    def _expert(self, layer: int) -> ExpertTimes:
        expert = self.spec.layers[layer]
        assert expert is not None
        return expert_times(self.profile, expert)

    def dense_s(self, num_tokens: int, *, is_backward: bool) -> float:
        """Of one layer's dense part."""
        profile = self.profile
        spread = profile.dense_backward_s_per_token if is_backward else profile.dense_forward_s_per_token
        outer = profile.outer_backward_s_per_token if is_backward else profile.outer_forward_s_per_token
        return max(0.0, spread - outer / self.spec.num_layers) * num_tokens

    def outer_s(self, num_tokens: int, *, is_backward: bool) -> float:
        """Of embeddings, head and loss."""
        profile = self.profile
        return num_tokens * (profile.outer_backward_s_per_token if is_backward else profile.outer_forward_s_per_token)

    def routing_s(self, layer: int, num_tokens: int, *, is_backward: bool) -> float:
        """Of sorting a wave's rows by expert, bringing them together and back."""
        times = self._expert(layer)
        curve = times.routing_backward if is_backward else times.routing_forward
        return 0.0 if curve is None else float(evaluate(curve, [num_tokens])[0])

    def experts_s(self, layer: int, counts: Sequence[float], *, is_backward: bool, on_cpu: bool) -> list[float]:
        """Of experts of the layer with so many rows each; in backward all of it."""
        times = self._expert(layer)
        curve: Curve = {
            (False, False): times.accelerator_forward,
            (False, True): times.accelerator_backward,
            (True, False): times.cpu_forward,
            (True, True): times.cpu_backward,
        }[on_cpu, is_backward]
        return evaluate(curve, counts).tolist()

    def steps_s(self, num_parameters: int) -> float:
        """Of the optimizer."""
        return num_parameters * self.profile.optimizer_s_per_parameter

    def norm_s(self, num_parameters: int) -> float:
        return num_parameters * self.profile.norm_s_per_parameter

    def adding_s(self, num_parameters: int) -> float:
        """Of one gradient to another in the store: three times as many bytes move as for a norm."""
        return 3 * self.norm_s(num_parameters)
