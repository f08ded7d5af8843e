"""What a forward pass is made of, for the planner: devices compute, then exchange, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.planning.exchanges import Exchange


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one device computes until the next exchange. Rows are tokens of all sequences."""

    attention_rows: int = 0
    attention_share: float = 0.0
    """Of the elements of attention's matrices."""
    scores: int = 0
    """Pairs of query and key, over heads and sequences."""
    mlp_rows: int = 0
    mlp_share: float = 0.0
    block_rows: int = 0
    block_share: float = 0.0
    """Of a decoupled layer: the hidden units of this device's sub-blocks, as a part of all."""
    block_heads: float = 1.0
    """Of the elements of these sub-blocks' attention matrices, that are this device's."""
    block_columns: float = 1.0
    """Of their MLPs'."""
    block_mlp_rows: int | None = None
    """Of their MLPs, where they are not ``block_rows`` too."""
    num_layers: int = 1
    """So many of them; what follows is not of layers."""
    embedded_rows: int = 0
    head_rows: int = 0
    head_share: float = 0.0
    """Of the words that are scored."""
    copied: int = 0
    """Values copied together."""

    @property
    def rows_of_block_mlp(self) -> int:
        return self.block_rows if self.block_mlp_rows is None else self.block_mlp_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """All devices compute, then exchange. Only itself is equal to it, so that what is known of it is found fast."""

    work: tuple[Work, ...]
    exchange: Exchange | None
    is_prepared: bool = False
    """Of a sum that is repeated for every token (``transport/repeated``)."""
    overlaps: bool = False
    """The exchange goes on while the next step is computed."""
    meanwhile: tuple[Work, ...] = ()
    """What all devices compute while the exchange goes on, and before the next step; none: they wait for it."""
    is_rest: bool = False
    """The exchange brings other tokens of what the one before it has brought."""
