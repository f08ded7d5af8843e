"""What the parts of a layer are, whatever its family calls them: what reads hidden units, what writes them, norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class HalfLayer:
    """Attention, or the MLP: ``readers`` have one input, the hidden units, in common; ``writer`` writes them."""

    readers: tuple[nn.Module, ...]
    writer: nn.Module
    norm: Any
    norm_first: bool
    num_joined: int = 1
    """Matrices that a reader keeps side by side along its outputs (GPT-2: q, k and v)."""

    @property
    def reading(self) -> list[Tensor]:
        """The readers' matrices, (out, in), to read and to write."""
        return [matrix for module in self.readers for matrix in _as_out_in(module).chunk(self.num_joined)]

    @property
    def writing(self) -> Tensor:
        """The writer's matrix, (out, in), to read and to write."""
        return _as_out_in(self.writer)


def halves_of(layer: Any) -> tuple[HalfLayer, HalfLayer]:
    """Attention and MLP of an original or decoupled layer of any family in ``isthmus.models.decoupled``."""
    if hasattr(layer, "self_attn"):
        own, mlp = layer.self_attn, layer.mlp
        return (
            HalfLayer((own.q_proj, own.k_proj, own.v_proj), own.o_proj, layer.input_layernorm, True),
            HalfLayer((mlp.gate_proj, mlp.up_proj), mlp.down_proj, layer.post_attention_layernorm, True),
        )
    if hasattr(layer, "attn"):
        own, mlp = layer.attn, layer.mlp
        return (
            HalfLayer((own.c_attn,), own.c_proj, layer.ln_1, True, num_joined=3),
            HalfLayer((mlp.c_fc,), mlp.c_proj, layer.ln_2, True),
        )
    own, output = layer.attention.self, layer.attention.output
    return (
        HalfLayer((own.query, own.key, own.value), output.dense, output.LayerNorm, False),
        HalfLayer((layer.intermediate.dense,), layer.output.dense, layer.output.LayerNorm, False),
    )


def _as_out_in(module: Any) -> Tensor:
    """The weight as (out, in): a view, through which it can be written. GPT-2 keeps its matrices the other way."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()
