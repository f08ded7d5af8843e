"""What a Mixture-of-Experts model is made of, as far as placement is concerned: layers, experts, bytes.

Legend: ``H`` hidden size, ``I`` expert intermediate size, ``E`` experts of a layer, ``k`` experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

OUTER_LAYER = -1
"""Layer number of what lies outside every layer: embeddings, final norm, head."""
DENSE = -1
"""Expert number of the part of a layer that is not a routed expert: attention, norms, router, shared experts."""
DENSE_FP32 = -2
"""Like ``DENSE``, for the few parameters that a model keeps in FP32 whatever its dtype is (some routers)."""


class UnitKey(NamedTuple):
    """Names one unit of placement: everything in a unit is moved, optimised and saved together.

    ``layer`` is the position of the layer in execution order (an encoder's layers come before its decoder's), or
    ``OUTER_LAYER``. ``expert`` is the routed expert's number, or ``DENSE`` or ``DENSE_FP32``.
    """

    layer: int
    expert: int

    @property
    def is_expert(self) -> bool:
        return self.expert >= 0


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor inside a unit's contiguous range: its name in the module, and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class UnitLayout:
    """A unit's contiguous range: its tensors one after the other, all of one dtype (``fp32`` or ``bf16``)."""

    tensors: tuple[TensorSpec, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """The routed experts of one layer. Every expert of a layer has the same tensors, in the same order.

    ``tensors`` are those of ONE expert, laid out one after the other in its contiguous range:

    - gated (``has_gate``): ``gate_up_proj`` (2I, H), [``gate_up_proj_bias`` (2I,)], ``down_proj`` (H, I),
      [``down_proj_bias`` (H,)]
    - not gated: ``up_proj`` (I, H), [``up_proj_bias`` (I,)], ``down_proj`` (H, I), [``down_proj_bias`` (H,)]

    ``is_transposed`` models (gpt-oss) store (H, 2I) and (I, H) instead.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    activation: str
    """Name of the elementwise part: ``silu_glu``, ``gelu_glu``, ``gpt_oss_glu``, ``relu``, …, or ``module`` (call the
    module's own)."""
    tensors: tuple[TensorSpec, ...]

    @property
    def numel(self) -> int:
        """Parameters of one expert."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def forward_flops_per_token(self) -> int:
        """Multiply-adds count as two."""
        matrices = 3 if self.has_gate else 2
        return 2 * matrices * self.hidden_size * self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole model. ``layers[l]`` is the routed-expert part of layer ``l`` in execution order, ``None`` for a dense
    layer."""

    model_type: str
    architecture: str
    is_encoder_decoder: bool
    num_layers: int
    hidden_size: int
    vocab_size: int
    layers: tuple[ExpertSpec | None, ...]
    dense_numel: tuple[int, ...]
    """Parameters of each layer that are not routed experts, shape (num_layers,)."""
    outer_numel: int

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(number for number, layer in enumerate(self.layers) if layer is not None)

    @property
    def num_expert_parameters(self) -> int:
        return sum(layer.num_experts * layer.numel for layer in self.layers if layer is not None)

    def layer_numel(self, layer: int) -> int:
        """Parameters of one layer, routed experts included."""
        expert = self.layers[layer]
        return self.dense_numel[layer] + (expert.num_experts * expert.numel if expert else 0)

    @property
    def num_held_layers(self) -> int:
        """Layers that have parameters: all of a whole model's, and of a part's (see ``part``) its own."""
        return sum(numel > 0 for numel in self.dense_numel)

    def part(self, layers: Collection[int], *, has_outer: bool) -> ModelSpec:
        """What one of several processes has of the model: the numbering stays, other layers hold nothing."""
        return replace(
            self,
            layers=tuple(layer if number in layers else None for number, layer in enumerate(self.layers)),
            dense_numel=tuple(numel if number in layers else 0 for number, numel in enumerate(self.dense_numel)),
            outer_numel=self.outer_numel if has_outer else 0,
        )

    @property
    def num_parameters(self) -> int:
        return self.num_expert_parameters + sum(self.dense_numel) + self.outer_numel
