"""One plan on one device: the strategy, what it takes to generate, and how the leader comes by the answer.

Shapes: B batch, T tokens, t this device's tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from isthmus.inference.generation import Generation, OnTokens
from isthmus.inference.layer import Layer
from isthmus.inference.strategies import make_strategy
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.models.shards import ShardReader
from isthmus.planning.pieces import Piece
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group


class Execution:
    """``group`` are the plan's devices, in its order, and ``mates`` those that share sub-blocks with this one; None
    where this one is alone. Its methods are called on all of them alike, and block."""

    def __init__(
        self,
        plan: InferencePlan,
        reader: ShardReader,
        group: Group | None,
        progress: Callable[[float], None] = lambda share: None,
        known: dict[Piece, Layer] | None = None,
        *,
        mates: Group | None = None,
        kept: Mapping[Piece, tuple[Piece, ...]] | None = None,
    ) -> None:
        """Reads this device's part, but for what ``known`` has; adds it there. ``kept``: see ``LocalModel``."""
        self.plan, self.group, self._reader = plan, group, reader
        self.groups = [each for each in (mates, group) if each is not None]
        """All that it exchanges anything with."""
        self.strategy: Strategy = make_strategy(plan, reader, group, progress, known, mates, kept)
        self._is_leader = group is None or group.rank == 0
        self._generation: Generation | None = None

    @torch.inference_mode()
    def hidden(self, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        """The last hidden states (B, T, H) on the leader; what it is on the others does not matter."""
        hidden_BtH = self._run(ids_BT, attended_BT)
        ranges = self.strategy.token_ranges(ids_BT.shape[1])
        return hidden_BtH if ranges is None else self._gather(hidden_BtH, ranges)

    @torch.inference_mode()
    def total(self, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        """The sum (B, H) of the hidden states of tokens that are not padding, on the leader."""
        hidden_BtH = self._run(ids_BT, attended_BT)
        ranges = self.strategy.token_ranges(ids_BT.shape[1])
        if ranges is None or self.group is None:
            return (hidden_BtH * attended_BT[:, :, None]).sum(dim=1)
        own = ranges[self.group.rank]
        part_BH = (hidden_BtH * attended_BT[:, own.start : own.stop, None]).sum(dim=1, keepdim=True)
        return self._gather(part_BH, [Range(start=rank, stop=rank + 1) for rank in range(len(ranges))]).sum(dim=1)

    def generate(
        self,
        ids_BT: Tensor,
        attended_BT: Tensor,
        settings: GenerationSettings,
        on_tokens: OnTokens,
        given: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """New tokens (B, n); see ``Generation.run``."""
        if self._generation is None:
            self._generation = Generation(self.strategy, self._reader, self.plan)
        return self._generation.run(ids_BT, attended_BT.bool(), settings, on_tokens, given)

    def _run(self, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        return self.strategy.run(Tokens.of(ids_BT, attended_BT, is_decoder=self._reader.spec.is_decoder))

    def _gather(self, part_BtH: Tensor, ranges: list[Range]) -> Tensor:
        """The devices' parts one after the other along dimension 1, on the leader; nothing of use on the others."""
        assert self.group is not None
        shape = (part_BtH.shape[0], -1, part_BtH.shape[2])
        sizes = [len(part) * shape[0] * shape[2] for part in ranges]
        flat = torch.empty(sum(sizes) if self._is_leader else 0)
        outputs = list(flat.split(sizes)) if self._is_leader else None
        self.group.gather(outputs, part_BtH.contiguous())
        return part_BtH if outputs is None else torch.cat([part.view(shape) for part in outputs], dim=1)
