"""Block parallelism (DeTransformer, Wei et al., DATE 2024, section III) for decoupled models.

Between two original layers every device computes its sub-blocks by itself. An original layer mixes all slices, and is
computed in one of the ways of ``ORIGINAL_PLANS``; its exchanges are in a codec of its own. What a device holds between
layers is one of three things: its ``slices`` of all tokens, the ``whole`` of all tokens, or the whole of its
``tokens``. A layer says what it wants, and what is there becomes it with the fewest bytes: an all-gather, or all-to-all
where each device needs but a part.

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
from isthmus.planning.shares import divide
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group

Fill = Callable[[int, int, Tensor, Tensor], None]
"""(layer, which of this device's sub-blocks, keys (B, G, T, D), values)."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass: what all layers need. ``own``: this device's tokens, where tokens are divided."""

    tokens: Tokens
    ranges: list[Range]
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
        sub_blocks: Sequence[Range],
        weights: Sequence[float] = (1.0,),
        originals: Sequence[str] = (),
        codecs: Sequence[str | None] = (),
    ) -> None:
        """``sub_blocks``: which each device has. ``weights``: by which tokens are divided. ``originals``: how each
        original layer is computed, in order; all ``gather`` without. ``codecs``: what exchanges before and in each
        layer, and after the last, are in; FP32 without. ``group`` None: this device is alone."""
        super().__init__(model)
        self.group, self._weights = group, tuple(weights)
        spec = model.spec
        assert spec.decoupling is not None
        layers = spec.decoupling.original_layers
        self._plans = dict(zip(layers, originals or ("gather",) * len(layers), strict=True))
        self._codecs = tuple(codecs) or (None,) * (spec.num_layers + 1)
        widths = spec.decoupling.widths
        self.widths = [sum(widths[part.start : part.stop]) for part in sub_blocks]
        self._rank = 0 if group is None else group.rank
        start = sum(self.widths[: self._rank])
        self.own_units = slice(start, start + self.widths[self._rank])

    def token_ranges(self, num_tokens: int) -> list[Range] | None:
        last = self.model.spec.num_layers - 1
        if self.group is None or self._plans.get(last) not in ("tokens", "sequence"):
            return None
        return divide(num_tokens, self._weights)

    def plan_of(self, number: int) -> str:
        """How an original layer is computed."""
        return self._plans[number] if self.group is not None else "gather"

    def run(self, tokens: Tokens, fill: Fill | None = None) -> Tensor:
        """``fill``: gets what a cache keeps of a prompt."""
        spec = self.model.spec
        given = self._begin(tokens, fill)
        kind, state = "whole", self.model.embed(tokens.ids_BT, tokens.positions_BT)
        for number in range(spec.num_layers):
            if number in self.model.blocks:
                kind, state = "slices", self._sub_blocks(number, self._as_slices(number, kind, state, given), given)
            elif self.group is None:
                state = self._whole_layer(number, self._as_whole(number, kind, state, given), given)
                kind = "whole"
            else:
                kind, state = self._original(self._plans[number], number, kind, state, given)
        if kind == "tokens":
            return self._finish(state)
        return self._finish(self._as_whole(spec.num_layers, kind, state, given))

    def _begin(self, tokens: Tokens, fill: Fill | None) -> _Pass:
        spec, model = self.model.spec, self.model
        num_tokens = tokens.ids_BT.shape[1]
        ranges = divide(num_tokens, self._weights)
        own = ranges[self._rank]
        allowed, is_causal = tokens.mask(spec)
        are_divided = self.group is not None and {"tokens", "sequence"} & set(self._plans.values())
        return _Pass(
            tokens=tokens,
            ranges=ranges,
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

    def _sub_blocks(self, number: int, own_BTw: Tensor, given: _Pass) -> Tensor:
        slices = own_BTw.split([len(part.units) for part in self.model.sub_blocks], dim=-1)
        return torch.cat(
            [
                self._alone(number, block, part, given, place)
                for place, (block, part) in enumerate(zip(self.model.blocks[number], slices, strict=True))
            ],
            dim=-1,
        )

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
        if plan == "gather":
            return "whole", self._whole_layer(number, self._as_whole(number, kind, state, given), given)
        if plan == "tensor":
            return "whole", self._tensor(number, self._as_whole(number, kind, state, given), given)
        if plan == "tokens":
            return "tokens", self._tokens(number, self._as_whole(number, kind, state, given), given)
        if plan == "sequence":
            return "tokens", self._sequence(number, self._as_tokens(number, kind, state, given), given)
        return "slices", self._fastest(number, self._as_slices(number, kind, state, given), given)

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
        batch = own_BtH.shape[0]
        gathered = [torch.empty(2, batch, spec.num_kv_heads, len(part), spec.head_size) for part in given.ranges]

        def attention(x_BtH: Tensor) -> Tensor:
            assert self.group is not None
            query, key, value = layer.project(x_BtH, given.own_rotation)
            self.group.all_gather(gathered, torch.stack((key, value)), codec=self._codecs[number])
            key, value = torch.cat(gathered, dim=3)
            if given.fill is not None:
                given.fill(number, 0, key, value)
            return layer.attend(query, key, value, given.own_allowed, False)

        return self._layer(layer, own_BtH, attention, layer.mlp)

    def _fastest(self, number: int, own_BTw: Tensor, given: _Pass) -> Tensor:
        """One device, the one with the largest weight, gathers all slices, computes the layer, and gives them back."""
        fastest = self._weights.index(max(self._weights))
        shape = own_BTw.shape[:-1]
        nothing = own_BTw.new_empty(0)
        is_it = self._rank == fastest
        mine = own_BTw.contiguous()
        parts = [own_BTw.new_empty(*shape, width) if is_it else nothing for width in self.widths]
        self._all_to_all(number, parts, [mine if rank == fastest else nothing for rank in range(len(self.widths))])
        outputs, inputs = [nothing] * len(parts), [nothing] * len(parts)
        own_out = torch.empty_like(mine)
        outputs[fastest] = own_out
        if is_it:
            whole_BTH = self._whole_layer(number, torch.cat(parts, dim=-1), given)
            inputs = [part.contiguous() for part in whole_BTH.split(self.widths, dim=-1)]
        self._all_to_all(number, outputs, inputs)
        return own_out

    # --- from what is there to what layer ``number`` wants ------------------------------------------------------------

    def _as_slices(self, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        if kind == "slices":
            return state
        if kind == "whole":
            return state[..., self.own_units]
        outputs = [state.new_empty(state.shape[0], len(part), self.widths[self._rank]) for part in given.ranges]
        self._all_to_all(number, outputs, [part.contiguous() for part in state.split(self.widths, dim=-1)])
        return torch.cat(outputs, dim=1)

    def _as_tokens(self, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        if kind == "tokens":
            return state
        if kind == "whole":
            return state[:, given.own.start : given.own.stop]
        outputs = [state.new_empty(state.shape[0], len(given.own), width) for width in self.widths]
        inputs = [state[:, part.start : part.stop].contiguous() for part in given.ranges]
        self._all_to_all(number, outputs, inputs)
        return torch.cat(outputs, dim=-1)

    def _as_whole(self, number: int, kind: str, state: Tensor, given: _Pass) -> Tensor:
        if kind == "whole" or self.group is None:
            return state
        if kind == "slices":
            gathered, dim = [state.new_empty(*state.shape[:-1], width) for width in self.widths], 2
        else:
            gathered = [state.new_empty(state.shape[0], len(part), state.shape[2]) for part in given.ranges]
            dim = 1
        self.group.all_gather(gathered, state.contiguous(), codec=self._codecs[number])
        return torch.cat(gathered, dim=dim)

    def _all_to_all(self, number: int, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        assert self.group is not None
        self.group.all_to_all(outputs, inputs, codec=self._codecs[number])
