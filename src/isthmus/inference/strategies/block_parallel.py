"""Block parallelism (DeTransformer, Wei et al., DATE 2024, section III) for decoupled models.

Between two original layers every device computes its sub-blocks by itself. Before an original layer slices are gathered
on every device, which computes all of the layer (BP+Allgather), and goes on with its own slices: one exchange a group
of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.inference.layer import Layer, Rotation
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group


class BlockParallel(Strategy):
    """``model`` has this device's sub-blocks, and all of each original layer."""

    def __init__(
        self, model: LocalModel, group: Group | None, *, sub_blocks: list[Range], codec: str | None = None
    ) -> None:
        """``sub_blocks``: which each device has. ``codec`` is what slices are sent in. ``group`` None: this device is
        alone."""
        super().__init__(model)
        self._group, self._codec = group, codec
        spec = model.spec
        assert spec.decoupling is not None
        widths = spec.decoupling.widths
        self._widths = [sum(widths[part.start : part.stop]) for part in sub_blocks]
        rank = 0 if group is None else group.rank
        start = sum(self._widths[:rank])
        self._own = slice(start, start + self._widths[rank])

    def run(self, tokens: Tokens) -> Tensor:
        spec = self.model.spec
        whole_BTH = self.model.embed(tokens.ids_BT, tokens.positions_BT)
        rotation = self.model.rotation(tokens.positions_BT)
        allowed, is_plainly_causal = tokens.mask(spec)
        originals = iter(self.model.layers)
        slices: list[Tensor] | None = None
        for number in range(spec.num_layers):
            if number in self.model.blocks:
                if slices is None:
                    slices = self._split(whole_BTH)
                slices = [
                    self._compute(block, part, rotation, allowed, is_plainly_causal)
                    for block, part in zip(self.model.blocks[number], slices, strict=True)
                ]
            else:
                if slices is not None:
                    whole_BTH, slices = self._join(slices), None
                whole_BTH = self._compute(next(originals), whole_BTH, rotation, allowed, is_plainly_causal)
        return self._finish(whole_BTH if slices is None else self._join(slices))

    def _compute(
        self, layer: Layer, hidden_BTH: Tensor, rotation: Rotation | None, allowed: Tensor | None, is_causal: bool
    ) -> Tensor:
        """A layer, or a sub-block, of which this device has all."""
        return self._layer(
            layer,
            hidden_BTH,
            lambda x_BTH: layer.attend(*layer.project(x_BTH, rotation), allowed, is_causal),
            layer.mlp,
        )

    def _split(self, whole_BTH: Tensor) -> list[Tensor]:
        """This device's slices."""
        return list(whole_BTH[..., self._own].split([len(part.units) for part in self.model.sub_blocks], dim=-1))

    def _join(self, slices: list[Tensor]) -> Tensor:
        """All slices, of all devices, (B, T, H)."""
        own_BTw = torch.cat(slices, dim=-1)
        if self._group is None:
            return own_BTw
        gathered = [own_BTw.new_empty(*own_BTw.shape[:-1], width) for width in self._widths]
        self._group.all_gather(gathered, own_BTw, codec=self._codec)
        return torch.cat(gathered, dim=-1)
