"""A decoupled decoder's forward passes of one request: the prompt at once, then one token of each sequence at a time.

Every sub-block has a KV cache of its own. Between two original layers a token needs no exchange; before one its slices
come together: (N - 1) · B · w values a device, a matter of latency alone. Original layers are computed whole on every
device, or with ``tensor`` divided, with two sums more. So are sub-blocks that a team of devices shares: each has the
cache of its heads, and the team two sums a layer.

Shapes: B batch, T tokens of the prompts, H hidden size, w hidden units of this device's slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.inference.decoding import attend_token
from isthmus.inference.kernels import MOST_ROWS
from isthmus.inference.kv_cache import KVCache
from isthmus.inference.layer import Layer
from isthmus.inference.native_blocks import NativeBlocks
from isthmus.inference.strategies.base import Tokens
from isthmus.inference.strategies.block_parallel import BlockParallel
from isthmus.planning.block_layout import COLUMNS
from isthmus.planning.exchanges import SMALL_VALUES
from isthmus.transport.base import Group
from isthmus.transport.repeated import RepeatedSum


class _Track:
    """Layers that follow one another on one hidden state (B, width): those of one sub-block, or the original ones.

    ``hidden_BH`` is changed in place. ``group``: who has the rest of these layers, None where this device has all.
    """

    def __init__(
        self, strategy: BlockParallel, layers: Sequence[Layer], tokens: Tokens, total: int, group: Group | None
    ) -> None:
        model = strategy.model
        self._layers, self._group = list(layers), group
        first, batch = self._layers[0], len(tokens.ids_BT)
        window = model.spec.sliding_window
        self.cache = KVCache(
            num_layers=len(self._layers),
            num_heads=first.num_cached_heads,
            head_size=model.spec.head_size,
            capacity=min(total, window or total),
            attended_BT=tokens.attended_BT,
        )
        self.hidden_BH = torch.empty(batch, first.width)
        self._part_BH, self._adds = self.hidden_BH, group is None
        self._add_up: RepeatedSum | None = None
        if group is not None and self.hidden_BH.numel() <= SMALL_VALUES:
            # The first device's part has what was there before in it, and the bias.
            self._add_up = group.repeated_sum(self.hidden_BH.numel())
            self.hidden_BH = self._part_BH = self._add_up.values.view(batch, -1)
            self._adds = group.rank == 0
        elif group is not None:
            self._part_BH = torch.empty_like(self.hidden_BH)
        self._positions_B1 = tokens.positions_BT[:, -1:].clone()
        self._rotary_TD = model.rotary_table(total)
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []
        self._mask_B11K: Tensor | None = None
        self._native: NativeBlocks | None = None
        if model.kernels is not None and batch <= MOST_ROWS:
            self._native = NativeBlocks(
                self._layers,
                self.cache,
                model.kernels,
                self.hidden_BH,
                self._part_BH,
                adds=self._adds,
                positions_B1=self._positions_B1,
                rotary=self._rotary_TD,
            )

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keeps the prompts' keys and values (B, G, T, D)."""
        own = self._layers[layer]
        self.cache.fill(layer, own.as_cached(key, 1), own.as_cached(value, 1))

    def next_token(self) -> None:
        """Makes room for one more token of each sequence."""
        self._positions_B1 += 1
        if self._native is not None:
            self._native.next_token()
        else:
            self._views, self._mask_B11K = self.cache.add_token()

    def layer(self, number: int) -> None:
        """The ``number``-th of the layers, for the token."""
        own = self._layers[number]
        for half, bias in enumerate((own.o_bias, own.down_bias)):
            if self._native is not None:
                self._native.blocks[2 * number + half]()
            else:
                self._put((self._mlp if half else self._attention)(number), bias)
            if self._add_up is not None:
                self._add_up()
            elif self._group is not None:
                self._group.all_reduce(self._part_BH, algorithm="two_step")
                self.hidden_BH += self._part_BH if bias is None else self._part_BH + bias

    def _attention(self, number: int) -> Tensor:
        own, rotary = self._layers[number], None
        if self._rotary_TD is not None:
            rotary = self._rotary_TD[0][self._positions_B1], self._rotary_TD[1][self._positions_B1]
        return attend_token(own, own.norm1(self.hidden_BH), rotary, self._views[number], self._mask_B11K)

    def _mlp(self, number: int) -> Tensor:
        own = self._layers[number]
        return own.mlp(own.norm2(self.hidden_BH))

    def _put(self, part_BH: Tensor, bias: Tensor | None) -> None:
        if self._adds:
            self.hidden_BH += part_BH if bias is None else part_BH + bias
        else:
            self._part_BH.copy_(part_BH)


class BlockDecoding:
    """One request on this device. Called on every device with the same tokens, in inference mode; blocks on the others.

    ``hidden_BH`` of each sequence's last token, after the final norm, is the same bits on all of them.
    """

    def __init__(self, strategy: BlockParallel, tokens: Tokens, num_new: int) -> None:
        """``tokens``: the prompts, padded on the left. ``num_new``: how often ``step`` may be called."""
        self._strategy, self._tokens = strategy, tokens
        self._model = model = strategy.model
        total = tokens.ids_BT.shape[1] + num_new
        numbers = list(model.blocks)
        self._order = {number: place for place, number in enumerate(numbers)}
        self._order |= {number: place for place, number in enumerate(model.originals)}
        columns = zip(*(model.blocks[number] for number in numbers), strict=True)
        self._blocks = [_Track(strategy, column, tokens, total, strategy.mates) for column in columns]
        # Native kernels of one track share what they are called with, so parts of layers have a track of their own.
        self._originals: dict[int, _Track] = {}
        whole = [number for number in model.originals if strategy.plan_of(number) != "tensor"]
        parts = [number for number in model.originals if strategy.plan_of(number) == "tensor"]
        for members, group in ((whole, None), (parts, strategy.group)):
            if members:
                track = _Track(strategy, [model.originals[number] for number in members], tokens, total, group)
                self._originals |= dict.fromkeys(members, track)
                self._order |= {number: place for place, number in enumerate(members)}
        batch = len(tokens.ids_BT)
        self._positions_B1 = tokens.positions_BT[:, -1:].clone()
        self._units = [each.units for each in strategy.layout.rectangles(COLUMNS, 1)]
        self._gathered = [torch.empty(batch, len(units)) for units in self._units]

    def prefill(self) -> Tensor:
        """``hidden_BH`` after the prompts."""
        return self._strategy.run(self._tokens, self._fill)[:, -1]

    def _fill(self, number: int, place: int, key: Tensor, value: Tensor) -> None:
        """Keys and values of layer ``number``, of this device's sub-block ``place``."""
        track = self._originals[number] if number in self._originals else self._blocks[place]
        track.fill(self._order[number], key, value)

    def step(self, ids_B: Tensor) -> Tensor:
        """``hidden_BH`` after one more token of each sequence."""
        self._positions_B1 += 1
        model = self._model
        whole_BH: Tensor | None = model.embed(ids_B[:, None], self._positions_B1)[:, 0]
        for track in {id(track): track for track in (*self._blocks, *self._originals.values())}.values():
            track.next_token()
        for number in range(model.spec.num_layers):
            place = self._order[number]
            if number in model.blocks:
                if whole_BH is not None:
                    self._hand_out(whole_BH)
                    whole_BH = None
                for track in self._blocks:
                    track.layer(place)
            else:
                whole_BH = self._gather() if whole_BH is None else whole_BH
                track = self._originals[number]
                track.hidden_BH.copy_(whole_BH)
                track.layer(place)
                whole_BH = track.hidden_BH
        hidden_BH = self._gather() if whole_BH is None else whole_BH.clone()
        return hidden_BH if model.final_norm is None else model.final_norm(hidden_BH)

    def _hand_out(self, whole_BH: Tensor) -> None:
        """Each sub-block's slice of the hidden units."""
        own = self._strategy.layout.units[self._strategy.rank]
        own_Bw = whole_BH[:, own.start : own.stop]
        widths = [track.hidden_BH.shape[1] for track in self._blocks]
        for track, part_Bw in zip(self._blocks, own_Bw.split(widths, dim=1), strict=True):
            track.hidden_BH.copy_(part_Bw)

    def _gather(self) -> Tensor:
        """All slices, (B, H), of which each of a team gives some columns; in FP32 whatever the codec, as so few bytes
        are bound by latency."""
        own_Bw = torch.cat([track.hidden_BH for track in self._blocks], dim=1)
        strategy = self._strategy
        if strategy.group is None:
            return own_Bw
        given, first = self._units[strategy.rank], strategy.layout.units[strategy.rank].start
        own_Bw = own_Bw[:, given.start - first : given.stop - first].contiguous()
        strategy.group.all_gather(self._gathered, own_Bw)
        return torch.cat(self._gathered, dim=1)
