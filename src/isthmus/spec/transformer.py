"""What a Transformer is made of, as far as dividing it among devices is concerned, and what a device's share of it is.

Legend: ``H`` hidden size, ``D`` head size, ``A`` query heads, ``G`` key/value heads, ``I`` MLP columns, ``V`` words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isthmus.spec.decoupling import Decoupling, decoupling


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """An encoder or a decoder of equal layers, each attention and MLP with a norm of their own."""

    schema_version: int = 1
    model_type: str
    is_decoder: bool
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_num_tokens: int
    """Positions that the model knows."""
    activation: str
    """The elementwise part by its name in transformers: ``gelu``, ``gelu_new``, ``silu``, …"""
    has_gate: bool
    """down(activation(gate(x)) · up(x)) instead of down(activation(up(x)))."""
    norm: str
    """``layer`` or ``rms``."""
    norm_epsilon: float
    norm_first: bool
    """Norms before attention and MLP and one after the last layer (decoders), or after each residual (BERT)."""
    has_rotary: bool
    """Rotary positions; else a learned table."""
    has_qk_norm: bool = False
    position_offset: int = 0
    """Added to a token's position before the table is read (RoBERTa)."""
    sliding_window: int | None = None
    """A token sees so many tokens, itself included."""
    num_token_types: int = 0
    is_head_tied: bool = True
    decoupling: Decoupling | None = None
    """Some of the layers are sub-blocks; the rest of this is that of the original."""

    def is_decoupled(self, layer: int) -> bool:
        """Whether that layer is one of sub-blocks."""
        return self.decoupling is not None and layer < self.num_layers and layer not in self.decoupling.original_layers

    def sub_block(self, number: int) -> SubBlock:
        """What sub-block ``number`` sees and computes, in all decoupled layers alike."""
        assert self.decoupling is not None
        widths = self.decoupling.widths
        start = sum(widths[:number])
        heads = Range(start=0, stop=self.num_heads)
        if self.decoupling.heads == "own":
            own = self.num_heads // len(widths)
            heads = Range(start=number * own, stop=(number + 1) * own)
        return SubBlock(units=Range(start=start, stop=start + widths[number]), heads=heads)

    def decoupled(self, num_sub_blocks: int, original_layers: Sequence[int], *, heads: str = "all") -> TransformerSpec:
        """The same with all layers but ``original_layers`` decoupled into equal slices. Raises ``IsthmusError`` for
        what does not fit."""
        form = decoupling(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            num_sub_blocks=num_sub_blocks,
            original_layers=original_layers,
            heads=heads,
        )
        return replace(self, decoupling=form)

    @property
    def num_sub_blocks(self) -> int:
        """Of its decoupled layers; 1: it is not decoupled."""
        return 1 if self.decoupling is None else self.decoupling.num_sub_blocks

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def product_share(self) -> float:
        """Of attention's matrix elements: those of queries, keys and values, which come from one product."""
        return (self.num_heads / 2 + self.num_kv_heads) / (self.num_heads + self.num_kv_heads)

    @property
    def attention_numel(self) -> int:
        """Matrix elements of one layer's attention: q, k, v, o."""
        return self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def mlp_numel(self) -> int:
        """Matrix elements of one layer's MLP."""
        return self.hidden_size * self.intermediate_size * (3 if self.has_gate else 2)

    @property
    def attention_columns(self) -> int:
        """Values of a token between attention's matrices: queries, keys, values, and what heads make of them."""
        return 2 * (self.num_heads + self.num_kv_heads) * self.head_size

    @property
    def mlp_columns(self) -> int:
        """Values of a token between the MLP's matrices."""
        return self.intermediate_size * (2 if self.has_gate else 1)

    @property
    def embedding_numel(self) -> int:
        """Elements of the tables before the first layer."""
        positions = 0 if self.has_rotary else self.max_num_tokens + self.position_offset
        return self.hidden_size * (self.vocab_size + positions + self.num_token_types)

    @property
    def num_parameters(self) -> int:
        """Matrix elements of the whole model; biases and norms are not counted."""
        head = self.vocab_size * self.hidden_size if self.is_decoder and not self.is_head_tied else 0
        return self.num_layers * (self.attention_numel + self.mlp_numel) + self.embedding_numel + head


@dataclass(frozen=True, kw_only=True)
class Range:
    """``start`` … ``stop`` - 1 of something."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def common(self, other: Range) -> Range:
        """What both have; empty where that is nothing."""
        start = max(self.start, other.start)
        return Range(start=start, stop=max(start, min(self.stop, other.stop)))


@dataclass(frozen=True, kw_only=True)
class SubBlock:
    """One sub-block of the decoupled layers: its hidden ``units``, and the query ``heads`` it has (all of them, unless
    each sub-block has heads of its own)."""

    units: Range
    heads: Range


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """What one device computes of every layer: query heads, MLP columns, and of the head's vocabulary.

    Key/value heads follow: those that the query heads use. Where devices outnumber them, several hold the same one.
    """

    heads: Range
    columns: Range
    vocabulary: Range

    @staticmethod
    def whole(spec: TransformerSpec) -> LayerShare:
        return LayerShare(
            heads=Range(start=0, stop=spec.num_heads),
            columns=Range(start=0, stop=spec.intermediate_size),
            vocabulary=Range(start=0, stop=spec.vocab_size),
        )

    def kv_heads(self, spec: TransformerSpec) -> Range:
        """The key/value heads that ``heads`` use; empty for no heads."""
        group = spec.heads_per_kv_head
        if not len(self.heads):
            return Range(start=0, stop=0)
        return Range(start=self.heads.start // group, stop=-(-self.heads.stop // group))
