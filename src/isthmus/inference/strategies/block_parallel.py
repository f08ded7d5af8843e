"""Block parallelism (DeTransformer, Wei et al., DATE 2024, section III) for decoupled models.

Between two original layers every device computes its sub-blocks by itself. An original layer mixes all slices, and is
computed in one of the ways of ``ORIGINAL_PLANS``; its exchanges are in a codec of its own. A layer says what it wants
of hidden states, and begins with its product for queries, keys and values; it leaves its MLP to be computed when the
next one begins. Both go token by token, so that the exchange between them may overlap with them (``block_states``).

Where devices outnumber sub-blocks, a team of them has one together: each computes its heads and columns of it, and sums
are exchanged in the team, scattered, so that each keeps its tokens.

Shapes: B batch, T tokens, t this device's tokens, H hidden units, w those of this device's slices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.inference.layer import Layer, Rotation
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.inference.strategies.block_states import Begin, Exchanges, Held, TokenPortions
from isthmus.planning.block_layout import FASTEST, PARTS, SLICES, TOKENS, WHOLE, BlockLayout
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group

Fill = Callable[[int, int, Tensor, Tensor], None]
"""(layer, which of this device's sub-blocks, keys (B, G, T, D), values)."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass: what all layers need. ``own``: this device's tokens, where tokens are divided."""

    portions: TokenPortions
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
        overlaps: bool = False,
    ) -> None:
        """``layout``: what each device has. ``mates``: those of this device's team, None where it has its sub-blocks to
        itself. ``originals``: how each original layer is computed, in order; all ``gather`` without. ``codecs``: what
        exchanges before and in each layer, and after the last, are in; FP32 without. ``overlaps``: exchanges
        between layers go in portions of the tokens, while others are computed. ``group`` None: this device is alone."""
        super().__init__(model)
        self.group, self.mates, self.layout = group, mates, layout
        spec = model.spec
        assert spec.decoupling is not None
        layers = spec.decoupling.original_layers
        self._plans = dict(zip(layers, originals or ("gather",) * len(layers), strict=True))
        self._codecs = tuple(codecs) or (None,) * (spec.num_layers + 1)
        self.rank = 0 if group is None else group.rank
        self._overlaps = overlaps
        self._exchanges = Exchanges(group, mates, layout, self._codecs)
        team = layout.parts[self.rank].team
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
        held = Held(WHOLE, self.model.embed(tokens.ids_BT, tokens.positions_BT))
        for number in range(spec.num_layers):
            if number not in self.model.blocks:
                held = self._original(number, held, given)
            elif self.mates is None:
                held = self._sub_blocks(number, held, given)
            else:
                held = self._with_mates(number, held, given)
        if held.kind == TOKENS:
            return self._finish(held.finished())
        return self._finish(self._become(WHOLE, spec.num_layers, held, given))

    def _begin(self, tokens: Tokens, fill: Fill | None) -> _Pass:
        spec, model = self.model.spec, self.model
        portions = TokenPortions.of(self.layout, self.rank, *tokens.ids_BT.shape, overlaps=self._overlaps)
        own = portions.whole.rectangles[TOKENS][self.rank].tokens
        allowed, is_causal = tokens.mask(spec)
        are_divided = self.group is not None and {"tokens", "sequence"} & set(self._plans.values())
        return _Pass(
            portions=portions,
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

    def _sub_blocks(self, number: int, held: Held, given: _Pass) -> Held:
        layers, widths = self.model.blocks[number], [len(part.units) for part in self.model.sub_blocks]

        def begin(own_BTw: Tensor) -> list[Tensor]:
            return [
                self._product(layer, part) for layer, part in zip(layers, own_BTw.split(widths, dim=-1), strict=True)
            ]

        def rest(own_BTw: Tensor) -> Tensor:
            parts = own_BTw.split(widths, dim=-1)
            return _together([self._mlp(layer, part) for layer, part in zip(layers, parts, strict=True)])

        own_BTw, products = self._begun(SLICES, number, held, given, begin)
        slices = own_BTw.split(widths, dim=-1)
        found = [
            self._attended(number, layer, part, product, given, place)
            for place, (layer, part, product) in enumerate(zip(layers, slices, products, strict=True))
        ]
        return Held(PARTS, _together(found), rest)

    def _with_mates(self, number: int, held: Held, given: _Pass) -> Held:
        """This device's heads and columns of its team's sub-block, of all tokens; sums of its own tokens (B, t, w)."""
        [layer], norm_first = self.model.blocks[number], self.model.spec.norm_first
        if held.kind == PARTS:
            own_Btw, all_BTw = held.finished(), None
        else:
            rows = given.portions.whole.rectangles[PARTS][self.rank].tokens
            all_BTw = self._become(SLICES, number, held, given)
            own_Btw = all_BTw[:, rows.start : rows.stop]

        def attention(x_Btw: Tensor) -> Tensor:
            if all_BTw is None:
                x_BTw = self._become(SLICES, number, Held(PARTS, x_Btw), given)
            else:  # everybody has all tokens already
                x_BTw = layer.norm1(all_BTw) if norm_first else all_BTw
            heads = self._heads(number, layer, layer.qkv(x_BTw), given)
            return self._scattered(number, layer.attend(*heads, given.allowed, given.is_causal), given)

        def mlp(x_Btw: Tensor) -> Tensor:
            return self._scattered(number, layer.mlp(self._become(SLICES, number, Held(PARTS, x_Btw), given)), given)

        return Held(PARTS, self._layer(layer, own_Btw, attention, mlp))

    def _scattered(self, number: int, partial_BTw: Tensor, given: _Pass) -> Tensor:
        """The team's sum, of this device's tokens."""
        assert self.mates is not None
        sizes = [len(own.tokens) for own in given.portions.whole.rectangles[PARTS][self._team]]
        parts = [part.contiguous() for part in partial_BTw.split(sizes, dim=1)]
        total_Btw = torch.empty_like(parts[self.mates.rank])
        self.mates.reduce_scatter(total_Btw, parts, codec=self._codecs[number])
        return total_Btw

    def _product(self, layer: Layer, hidden_BTH: Tensor) -> Tensor:
        """Queries, keys and values in one."""
        return layer.qkv(layer.norm1(hidden_BTH) if self.model.spec.norm_first else hidden_BTH)

    def _heads(
        self, number: int, layer: Layer, product_BTX: Tensor, given: _Pass, place: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all tokens, and the latter two kept for those to come."""
        query, key, value = layer.separate(product_BTX, given.rotation)
        if given.fill is not None:
            given.fill(number, place, key, value)
        return query, key, value

    def _attended(
        self, number: int, layer: Layer, hidden_BTH: Tensor, product_BTX: Tensor, given: _Pass, place: int = 0
    ) -> Tensor:
        """A layer, or a sub-block, of which this device has all, up to its MLP, of all tokens."""
        heads = self._heads(number, layer, product_BTX, given, place)
        total_BTH = layer.attend(*heads, given.allowed, given.is_causal)
        return self._add(hidden_BTH, total_BTH, layer.norm1, layer.o_bias)

    def _mlp(self, layer: Layer, hidden_BTH: Tensor) -> Tensor:
        return self._block(hidden_BTH, layer.norm2, layer.mlp, layer.down_bias)

    def _original(self, number: int, held: Held, given: _Pass) -> Held:
        plan, layer = self.plan_of(number), self.model.originals.get(number)
        if plan == "fastest":
            held = self._fastest(number, held, given)
            return Held(PARTS, self._become(PARTS, number, held, given))
        assert layer is not None
        wanted = TOKENS if plan == "sequence" else WHOLE
        state, [product] = self._begun(wanted, number, held, given, lambda x: [self._product(layer, x)])
        if plan == "tensor":
            return Held(WHOLE, self._tensor(number, layer, state, product, given))
        rest = functools.partial(self._mlp, layer)
        if plan == "gather":
            return Held(WHOLE, self._attended(number, layer, state, product, given), rest)
        attend = self._tokens if plan == "tokens" else self._sequence
        return Held(TOKENS, attend(number, layer, state, product, given), rest)

    def _tensor(self, number: int, layer: Layer, whole_BTH: Tensor, product_BTX: Tensor, given: _Pass) -> Tensor:
        """Heads and columns are divided: BP+TP."""

        def summed(partial_BTH: Tensor) -> Tensor:
            assert self.group is not None
            partial_BTH = partial_BTH.contiguous()
            self.group.all_reduce(partial_BTH, codec=self._codecs[number], algorithm="two_step")
            return partial_BTH

        heads = self._heads(number, layer, product_BTX, given)
        total_BTH = summed(layer.attend(*heads, given.allowed, given.is_causal))
        hidden_BTH = self._add(whole_BTH, total_BTH, layer.norm1, layer.o_bias)
        return self._block(hidden_BTH, layer.norm2, lambda x_BTH: summed(layer.mlp(x_BTH)), layer.down_bias)

    def _tokens(self, number: int, layer: Layer, whole_BTH: Tensor, product_BTX: Tensor, given: _Pass) -> Tensor:
        """Every device has keys and values of all tokens, and does the rest for its own, up to the MLP here."""
        rows = slice(given.own.start, given.own.stop)
        query, key, value = self._heads(number, layer, product_BTX, given)
        total_BtH = layer.attend(query[:, :, rows], key, value, given.own_allowed, False)
        return self._add(whole_BTH[:, rows], total_BtH, layer.norm1, layer.o_bias)

    def _sequence(self, number: int, layer: Layer, own_BtH: Tensor, product_BtX: Tensor, given: _Pass) -> Tensor:
        """Every device has its tokens, and gathers keys and values of the others: BP+SP, up to the MLP here."""
        assert self.group is not None
        batch, spec = own_BtH.shape[0], self.model.spec
        ranges = [own.tokens for own in given.portions.whole.rectangles[TOKENS]]
        gathered = [torch.empty(2, batch, spec.num_kv_heads, len(part), spec.head_size) for part in ranges]
        query, key, value = layer.separate(product_BtX, given.own_rotation)
        self.group.all_gather(gathered, torch.stack((key, value)), codec=self._codecs[number])
        key, value = torch.cat(gathered, dim=3)
        if given.fill is not None:
            given.fill(number, 0, key, value)
        total_BtH = layer.attend(query, key, value, given.own_allowed, False)
        return self._add(own_BtH, total_BtH, layer.norm1, layer.o_bias)

    def _fastest(self, number: int, held: Held, given: _Pass) -> Held:
        """One device, the one with the largest weight, gets everything and computes the layer."""
        if self.rank != self.layout.fastest:
            return Held(FASTEST, self._become(FASTEST, number, held, given))
        layer = self.model.originals[number]
        whole_BTH, [product] = self._begun(FASTEST, number, held, given, lambda x: [self._product(layer, x)])
        attended_BTH = self._attended(number, layer, whole_BTH, product, given)
        return Held(FASTEST, attended_BTH, functools.partial(self._mlp, layer))

    def _become(self, wanted: str, number: int, held: Held, given: _Pass) -> Tensor:
        return self._begun(wanted, number, held, given, lambda _: [])[0]

    def _begun(self, wanted: str, number: int, held: Held, given: _Pass, begin: Begin) -> tuple[Tensor, list[Tensor]]:
        """What layer ``number`` wants, of what is there, and what it computes of that first (``Exchanges``)."""
        return self._exchanges.become(wanted, number, held, given.portions, begin)


def _together(slices: Sequence[Tensor]) -> Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(list(slices), dim=-1)
