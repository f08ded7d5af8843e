"""Block parallelism (DeTransformer, Wei et al., DATE 2024, section III) for decoupled models.

Between two original layers every device computes its sub-blocks by itself. An original layer mixes all slices, and is
computed in one of the ways of ``ORIGINAL_PLANS``; its exchanges are in a codec of its own. What a device holds between
layers is a rectangle of tokens and hidden units (``planning/block_layout``). A layer says which it wants, and what is
there becomes it with the fewest bytes: an all-gather, or all-to-all where each device needs but a part.

Where devices outnumber sub-blocks, a team of them has one together: each computes its heads and columns of it, and sums
are exchanged in the team, scattered, so that each keeps its tokens.

Shapes: B batch, T tokens, t this device's tokens, H hidden units, w those of this device's slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.inference.layer import Layer, Rotation
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.planning.block_layout import FASTEST, PARTS, SLICES, TOKENS, WHOLE, BlockLayout, Rectangle
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group

Fill = Callable[[int, int, Tensor, Tensor], None]
"""(layer, which of this device's sub-blocks, keys (B, G, T, D), values)."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass: what all layers need. ``rectangles``: what each device has in each state. ``own``: this
    device's tokens, where tokens are divided."""

    rectangles: dict[str, list[Rectangle]]
    own: Range
    rotation: Rotation | None
    own_rotation: Rotation | None
    allowed: Tensor | None
    is_causal: bool
    own_allowed: Tensor | None
    fill: Fill | None
    """Gets the keys and values of all tokens, for those to come."""


class BlockParallel(Strategy):
    """``model`` has this device's sub-blocks, and what its part of each original layer takes."""

    def __init__(
        self,
        model: LocalModel,
        group: Group | None,
        *,
        layout: BlockLayout,
        mates: Group | None = None,
        originals: Sequence[str] = (),
        codecs: Sequence[str | None] = (),
    ) -> None:
        """``layout``: what each device has. ``mates``: those of this device's team, None where it has its sub-blocks to
        itself. ``originals``: how each original layer is computed, in order; all ``gather`` without. ``codecs``: what
        exchanges before and in each layer, and after the last, are in; FP32 without. ``group`` None: this device is
        alone."""
        super().__init__(model)
        self.group, self.mates, self.layout = group, mates, layout
        spec = model.spec
        assert spec.decoupling is not None
        layers = spec.decoupling.original_layers
        self._plans = dict(zip(layers, originals or ("gather",) * len(layers), strict=True))
        self._codecs = tuple(codecs) or (None,) * (spec.num_layers + 1)
        self.rank = 0 if group is None else group.rank
        team = layout.parts[self.rank].team
        assert len(team) == (1 if mates is None else mates.world_size)
        self._team = slice(team.start, team.stop)

    def token_ranges(self, num_tokens: int) -> list[Range] | None:
        last = self.model.spec.num_layers - 1
        if self.group is None or self._plans.get(last) not in ("tokens", "sequence"):
            return None
        return [own.tokens for own in self.layout.rectangles(TOKENS, num_tokens)]

    def plan_of(self, number: int) -> str:
        """How an original layer is computed."""
        return self._plans[number] if self.group is not None else "gather"

    def run(self, tokens: Tokens, fill: Fill | None = None) -> Tensor:
        """``fill``: gets what a cache keeps of a prompt."""
        spec = self.model.spec
        given = self._begin(tokens, fill)
        kind, state = WHOLE, self.model.embed(tokens.ids_BT, tokens.positions_BT)
        for number in range(spec.num_layers):
            if number in self.model.blocks:
                compute = self._sub_blocks if self.mates is None else self._with_mates
                kind, state = PARTS, compute(number, kind, state, given)
            else:
                kind, state = self._original(self.plan_of(number), number, kind, state, given)
        return self._finish(state if kind == TOKENS else self._become(WHOLE, spec.num_layers, kind, state, given))

    def _begin(self, tokens: Tokens, fill: Fill | None) -> _Pass:
        spec, model = self.model.spec, self.model
        num_tokens = tokens.ids_BT.shape[1]
        states = (WHOLE, TOKENS, FASTEST, PARTS, SLICES)
        rectangles = {state: self.layout.rectangles(state, num_tokens) for state in states}
        own = rectangles[TOKENS][self.rank].tokens
        allowed, is_causal = tokens.mask(spec)
        are_divided = self.group is not None and {"tokens", "sequence"} & set(self._plans.values())
        return _Pass(
            rectangles=rectangles,
            own=own,
            rotation=model.rotation(tokens.positions_BT),
            own_rotation=model.rotation(tokens.positions_BT[:, own.start : own.stop]),
            allowed=allowed,
            is_causal=is_causal,
            own_allowed=tokens.allowed(own, is_causal=spec.is_decoder, window=spec.sliding_window)
            if are_divided
            else None,
            fill=fill,
        )

    # --- layers -------------------------------------------------------------------------------------------------------

    def _sub_blocks(self, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        own_BTw = self._become(SLICES, number, kind, state, given)
        slices = own_BTw.split([len(part.units) for part in self.model.sub_blocks], dim=-1)
        return torch.cat(
            [
                self._alone(number, block, part, given, place)
                for place, (block, part) in enumerate(zip(self.model.blocks[number], slices, strict=True))
            ],
            dim=-1,
        )

    def _with_mates(self, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        """This device's heads and columns of its team's sub-block, of all tokens; sums of its own tokens (B, t, w)."""
        [layer], norm_first = self.model.blocks[number], self.model.spec.norm_first
        own_Btw, all_BTw = state, None
        if kind != PARTS:
            rows = given.rectangles[PARTS][self.rank].tokens
            all_BTw = self._become(SLICES, number, kind, state, given)
            own_Btw = all_BTw[:, rows.start : rows.stop]

        def attention(x_Btw: Tensor) -> Tensor:
            if all_BTw is None:
                x_BTw = self._become(SLICES, number, PARTS, x_Btw, given)
            else:  # everybody has all tokens already
                x_BTw = layer.norm1(all_BTw) if norm_first else all_BTw
            partial_BTw = layer.attend(*self._project(number, layer, x_BTw, given), given.allowed, given.is_causal)
            return self._scattered(number, partial_BTw, given)

        def mlp(x_Btw: Tensor) -> Tensor:
            return self._scattered(number, layer.mlp(self._become(SLICES, number, PARTS, x_Btw, given)), given)

        return self._layer(layer, own_Btw, attention, mlp)

    def _scattered(self, number: int, partial_BTw: Tensor, given: _Pass) -> Tensor:
        """The team's sum, of this device's tokens."""
        assert self.mates is not None
        sizes = [len(own.tokens) for own in given.rectangles[PARTS][self._team]]
        parts = [part.contiguous() for part in partial_BTw.split(sizes, dim=1)]
        total_Btw = torch.empty_like(parts[self.mates.rank])
        self.mates.reduce_scatter(total_Btw, parts, codec=self._codecs[number])
        return total_Btw

    def _alone(self, number: int, layer: Layer, hidden_BTH: Tensor, given: _Pass, place: int = 0) -> Tensor:
        """A layer, or a sub-block, of which this device has all, of all tokens."""

        def attention(x_BTH: Tensor) -> Tensor:
            return layer.attend(*self._project(number, layer, x_BTH, given, place), given.allowed, given.is_causal)

        return self._layer(layer, hidden_BTH, attention, layer.mlp)

    def _whole_layer(self, number: int, whole_BTH: Tensor, given: _Pass) -> Tensor:
        return self._alone(number, self.model.originals[number], whole_BTH, given)

    def _project(
        self, number: int, layer: Layer, x_BTH: Tensor, given: _Pass, place: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = layer.project(x_BTH, given.rotation)
        if given.fill is not None:
            given.fill(number, place, key, value)
        return query, key, value

    def _original(self, plan: str, number: int, kind: str, state: Tensor, given: _Pass) -> tuple[str, Tensor]:
        if plan == "fastest":
            return PARTS, self._fastest(number, kind, state, given)
        if plan == "sequence":
            return TOKENS, self._sequence(number, self._become(TOKENS, number, kind, state, given), given)
        whole_BTH = self._become(WHOLE, number, kind, state, given)
        if plan == "tokens":
            return TOKENS, self._tokens(number, whole_BTH, given)
        compute = self._whole_layer if plan == "gather" else self._tensor
        return WHOLE, compute(number, whole_BTH, given)

    def _tensor(self, number: int, whole_BTH: Tensor, given: _Pass) -> Tensor:
        """Heads and columns are divided: BP+TP."""
        layer = self.model.originals[number]

        def summed(partial_BTH: Tensor) -> Tensor:
            assert self.group is not None
            partial_BTH = partial_BTH.contiguous()
            self.group.all_reduce(partial_BTH, codec=self._codecs[number], algorithm="two_step")
            return partial_BTH

        def attention(x_BTH: Tensor) -> Tensor:
            return summed(layer.attend(*self._project(number, layer, x_BTH, given), given.allowed, given.is_causal))

        return self._layer(layer, whole_BTH, attention, lambda x_BTH: summed(layer.mlp(x_BTH)))

    def _tokens(self, number: int, whole_BTH: Tensor, given: _Pass) -> Tensor:
        """Every device has keys and values of all tokens, and does the rest for its own."""
        layer, rows = self.model.originals[number], slice(given.own.start, given.own.stop)
        norm_first = self.model.spec.norm_first

        def attention(x_BtH: Tensor) -> Tensor:
            # What the block got is the norm of this device's tokens alone; keys and values need all of them.
            all_BTH = layer.norm1(whole_BTH) if norm_first else whole_BTH
            query, key, value = self._project(number, layer, all_BTH, given)
            return layer.attend(query[:, :, rows], key, value, given.own_allowed, False)

        return self._layer(layer, whole_BTH[:, rows], attention, layer.mlp)

    def _sequence(self, number: int, own_BtH: Tensor, given: _Pass) -> Tensor:
        """Every device has its tokens, and gathers keys and values of the others: BP+SP."""
        layer, spec = self.model.originals[number], self.model.spec
        batch, ranges = own_BtH.shape[0], [own.tokens for own in given.rectangles[TOKENS]]
        gathered = [torch.empty(2, batch, spec.num_kv_heads, len(part), spec.head_size) for part in ranges]

        def attention(x_BtH: Tensor) -> Tensor:
            assert self.group is not None
            query, key, value = layer.project(x_BtH, given.own_rotation)
            self.group.all_gather(gathered, torch.stack((key, value)), codec=self._codecs[number])
            key, value = torch.cat(gathered, dim=3)
            if given.fill is not None:
                given.fill(number, 0, key, value)
            return layer.attend(query, key, value, given.own_allowed, False)

        return self._layer(layer, own_BtH, attention, layer.mlp)

    def _fastest(self, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        """One device, the one with the largest weight, gets everything, computes the layer, and gives each its part."""
        state = self._become(FASTEST, number, kind, state, given)
        if self.rank == self.layout.fastest:
            state = self._whole_layer(number, state, given)
        return self._become(PARTS, number, FASTEST, state, given)

    # --- from what is there to what layer ``number`` wants ------------------------------------------------------------

    def _become(self, wanted: str, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        has = given.rectangles[kind]
        if self.group is None or kind == wanted:
            return state
        if kind == WHOLE:
            return _cut(state, has[self.rank], given.rectangles[wanted][self.rank])
        if (kind, wanted) == (PARTS, SLICES):
            return state if self.mates is None else self._gather(self.mates, number, state, has[self._team])
        if wanted == WHOLE:
            return self._gather(self.group, number, state, has)
        return self._move(number, state, has, given.rectangles[wanted])

    def _gather(self, group: Group, number: int, state: Tensor, has: Sequence[Rectangle]) -> Tensor:
        """All that ``group``, of whom each ``has`` a part, has together."""
        parts = [state.new_empty(len(state), len(each.tokens), len(each.units)) for each in has]
        group.all_gather(parts, state.contiguous(), codec=self._codecs[number])
        first, last = has[0], has[-1]
        return _joined(
            state,
            Rectangle(
                tokens=Range(start=first.tokens.start, stop=last.tokens.stop),
                units=Range(start=first.units.start, stop=last.units.stop),
            ),
            has,
            parts,
        )

    def _move(self, number: int, state: Tensor, has: Sequence[Rectangle], wants: Sequence[Rectangle]) -> Tensor:
        """What this device wants, where each ``has`` one part of everything and ``wants`` another."""
        assert self.group is not None
        own, wanted = has[self.rank], wants[self.rank]
        inputs = [_cut(state, own, own.common(each)).contiguous() for each in wants]
        pieces = [each.common(wanted) for each in has]
        outputs = [state.new_empty(len(state), len(each.tokens), len(each.units)) for each in pieces]
        self.group.all_to_all(outputs, inputs, codec=self._codecs[number])
        return _joined(state, wanted, pieces, outputs)


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
