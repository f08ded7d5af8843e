"""What devices hold of hidden states between layers of a decoupled model, and the exchanges that make another of it.

What a device holds is a rectangle of tokens and hidden units (``planning/block_layout``). What is there becomes what is
wanted with the fewest bytes: an all-gather, or all-to-all where each device needs but a part. With a plan that
``overlaps`` it does so in two portions of the tokens, each on its way while the device computes what it can of the
other: the rest of the layer before for the second, the beginning of the next layer for the first.

Shapes: B batch, t tokens and w hidden units of what a device has in a state, p tokens of a portion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.planning.block_layout import (
    ALL,
    FASTEST,
    PARTS,
    SLICES,
    TOKENS,
    WHOLE,
    BlockLayout,
    Portion,
    Rectangle,
)
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group

_STATES = (WHOLE, TOKENS, FASTEST, PARTS, SLICES)
Begin = Callable[[Tensor], list[Tensor]]
"""What a layer computes first, token by token: of states (B, p, w) any number of products (B, p, _)."""


@dataclass(frozen=True)
class Held:
    """What this device holds in state ``kind``: ``value`` (B, t, w), of which ``rest`` is still to be computed, token
    by token, where it is not None."""

    kind: str
    value: Tensor
    rest: Callable[[Tensor], Tensor] | None = None

    def finished(self, rows_p: Tensor | None = None) -> Tensor:
        """All of it, or these of its tokens."""
        value = self.value if rows_p is None else self.value.index_select(1, rows_p)
        return value if self.rest is None else self.rest(value)


@dataclass(frozen=True)
class TokenPortion:
    """Tokens that are exchanged together. ``rectangles``: what each device has of them in each state, counted anew from
    0. ``rows``: which they are of those that this device has in a state; None: all."""

    rectangles: dict[str, list[Rectangle]]
    rows: dict[str, Tensor | None]


@dataclass(frozen=True)
class TokenPortions:
    """Those of a request that are exchanged one after the other, and ``whole``, all of it."""

    whole: TokenPortion
    parts: tuple[TokenPortion, ...]

    @classmethod
    def of(cls, layout: BlockLayout, rank: int, batch: int, num_tokens: int, *, overlaps: bool) -> TokenPortions:
        """As the device ``rank`` sees them."""
        portions = layout.portions(overlaps=overlaps, num_tokens=num_tokens, batch=batch)
        return cls(
            whole=_portion(layout, rank, num_tokens, ALL),
            parts=tuple(_portion(layout, rank, num_tokens, portion) for portion in portions),
        )


def _portion(layout: BlockLayout, rank: int, num_tokens: int, portion: Portion) -> TokenPortion:
    rows: dict[str, Tensor | None] = dict.fromkeys(_STATES)
    if portion != ALL:
        tokens = layout.token_ranges(num_tokens, portion)
        rows = {state: _rows(layout.rectangles(state, num_tokens)[rank].tokens, tokens) for state in _STATES}
    return TokenPortion({state: layout.rectangles(state, num_tokens, portion) for state in _STATES}, rows)


def _rows(own: Range, tokens: Sequence[Range]) -> Tensor:
    """Where ``tokens`` are in ``own``, as far as they are there."""
    common = [own.common(each) for each in tokens]
    return torch.cat([torch.arange(each.start, each.stop) for each in common]) - own.start


class Exchanges:
    """Of one device. ``group``: all that have a part, ``mates`` those of its team, None where there are no others.
    ``codecs``: of exchanges before and in each layer, and after the last one."""

    def __init__(
        self, group: Group | None, mates: Group | None, layout: BlockLayout, codecs: Sequence[str | None]
    ) -> None:
        self._group, self._mates, self._codecs = group, mates, codecs
        self._rank = 0 if group is None else group.rank
        team = layout.parts[self._rank].team
        assert len(team) == (1 if mates is None else mates.world_size)
        self._team = slice(team.start, team.stop)

    def become(
        self, wanted: str, number: int, held: Held, portions: TokenPortions, begin: Begin
    ) -> tuple[Tensor, list[Tensor]]:
        """What this device has in state ``wanted`` before layer ``number``, (B, t, w), and what ``begin`` makes of it,
        (B, t, _) each. Blocks on the others where that takes an exchange."""
        kind, whole = held.kind, portions.whole.rectangles
        is_there = kind in (wanted, WHOLE) or ((kind, wanted) == (PARTS, SLICES) and self._mates is None)
        if self._group is None or is_there:
            state = held.finished()
            if kind == WHOLE:
                state = _cut(state, whole[WHOLE][self._rank], whole[wanted][self._rank])
            return state, begin(state)
        coming = [
            self._exchange(wanted, number, kind, held.finished(part.rows[kind]), part, len(portions.parts) > 1)
            for part in portions.parts
        ]
        found: list[list[Tensor]] = []
        for arrive in coming:
            state = arrive()
            found.append([state, *begin(state)])
        rows = [part.rows[wanted] for part in portions.parts]
        num_tokens = len(whole[wanted][self._rank].tokens)
        state, *products = (_in_order(parts, rows, num_tokens) for parts in zip(*found, strict=True))
        return state, products

    def _exchange(
        self, wanted: str, number: int, kind: str, state: Tensor, portion: TokenPortion, is_started: bool
    ) -> Callable[[], Tensor]:
        """What gives this device's ``portion`` in state ``wanted``, and blocks until it is there. ``is_started``:
        devices exchange from now on, else they have when this returns."""
        has, wants = portion.rectangles[kind], portion.rectangles[wanted]
        group = self._group
        assert group is not None
        if (kind, wanted) == (PARTS, SLICES):
            assert self._mates is not None
            group, has = self._mates, has[self._team]
        if wanted == WHOLE or group is self._mates:  # all that ``group`` has together
            pieces, inputs = has, None
        else:
            pieces = [each.common(wants[self._rank]) for each in has]
            inputs = [_cut(state, has[self._rank], has[self._rank].common(each)).contiguous() for each in wants]
        outputs = [state.new_empty(len(state), len(each.tokens), len(each.units)) for each in pieces]
        if inputs is None:
            call = functools.partial(group.all_gather, outputs, state.contiguous(), codec=self._codecs[number])
        else:
            call = functools.partial(group.all_to_all, outputs, inputs, codec=self._codecs[number])
        wait = group.start(call).wait if is_started else call()

        def arrive() -> Tensor:
            if wait is not None:
                wait()
            return _joined(state, wants[self._rank], pieces, outputs)

        return arrive


def _cut(state: Tensor, own: Rectangle, part: Rectangle) -> Tensor:
    """``part`` of ``own``, which ``state`` is; a view."""
    tokens, units = part.tokens.start - own.tokens.start, part.units.start - own.units.start
    return state[:, tokens : tokens + len(part.tokens), units : units + len(part.units)]


def _joined(like: Tensor, whole: Rectangle, pieces: Sequence[Rectangle], values: Sequence[Tensor]) -> Tensor:
    """``whole``, of whose ``pieces`` these are the ``values``."""
    joined = like.new_empty(len(like), len(whole.tokens), len(whole.units))
    for piece, value in zip(pieces, values, strict=True):
        _cut(joined, whole, piece).copy_(value)
    return joined


def _in_order(parts: Sequence[Tensor], rows: Sequence[Tensor | None], num_tokens: int) -> Tensor:
    """(B, t, _) of which ``parts`` are these ``rows``."""
    if len(parts) == 1:
        return parts[0]
    joined = parts[0].new_empty(len(parts[0]), num_tokens, parts[0].shape[-1])
    for part, rows_p in zip(parts, rows, strict=True):
        assert rows_p is not None
        joined.index_copy_(1, rows_p, part)
    return joined
