"""Pipeline parallelism (GPipe, Huang et al. 2019), for many sequences: devices hold some layers each, and pass on.

A batch is cut into micro-batches, so that all devices work at the same time. One sequence takes as long as on one
device, and the way between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.planning.shares import micro_batches
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group, Handle


class Pipeline(Strategy):
    """Device r computes the layers of ``model``, the r-th part of them; the last one has the answers.

    The next micro-batch is received, and the last one sent, while one is computed. Order on every device: receive 0, 1;
    send 0; receive 2; send 1; … Whoever sends waits at most for a micro-batch that was sent before.
    """

    def __init__(self, model: LocalModel, group: Group, *, codec: str | None = None) -> None:
        """``codec`` is what activations are sent in."""
        super().__init__(model)
        self._group = group
        self._codec = None if codec is None else group.codec(codec)
        self._local = TensorParallel(model, None)
        self._is_first, self._is_last = group.rank == 0, group.rank == group.world_size - 1

    def token_ranges(self, num_tokens: int) -> list[Range]:
        nothing = Range(start=0, stop=0)
        return [nothing] * (self._group.world_size - 1) + [Range(start=0, stop=num_tokens)]

    def run(self, tokens: Tokens) -> Tensor:
        batch, num_tokens = tokens.ids_BT.shape
        parts = [tokens.part(rows) for rows in micro_batches(batch, num_tokens)]
        coming = self._receive(parts[0])
        sending: list[tuple[Handle, Tensor]] = []
        found = []
        for number, part in enumerate(parts):
            hidden_BTH = self.model.embed(part.ids_BT, part.positions_BT) if coming is None else self._decode(*coming)
            if number + 1 < len(parts):
                coming = self._receive(parts[number + 1])
            hidden_BTH = self._local.transform(part, hidden_BTH)
            if self._is_last:
                found.append(self._finish(hidden_BTH))
            else:
                sending.append(self._send(hidden_BTH))
        for handle, _ in sending:
            handle.wait()
        return torch.cat(found) if found else torch.empty(batch, 0, self.model.spec.hidden_size)

    def _receive(self, part: Tokens) -> tuple[Handle, Tensor, tuple[int, ...]] | None:
        """Begins to; None on the first device."""
        if self._is_first:
            return None
        shape = (*part.ids_BT.shape, self.model.spec.hidden_size)
        numel = shape[0] * shape[1] * shape[2]
        if self._codec is None:
            payload = torch.empty(numel)
        else:
            payload = torch.empty(self._codec.num_bytes(numel), dtype=torch.uint8)
        return self._group.start(self._group.recv, payload, self._group.rank - 1), payload, shape

    def _decode(self, handle: Handle, payload: Tensor, shape: tuple[int, ...]) -> Tensor:
        handle.wait()
        if self._codec is None:
            return payload.view(shape)
        hidden_BTH = torch.empty(shape)
        self._codec.decode(payload, hidden_BTH.view(-1))
        return hidden_BTH

    def _send(self, hidden_BTH: Tensor) -> tuple[Handle, Tensor]:
        payload = hidden_BTH.contiguous()
        if self._codec is not None:
            payload = torch.empty(self._codec.num_bytes(hidden_BTH.numel()), dtype=torch.uint8)
            self._codec.encode(hidden_BTH.reshape(-1), payload)
        return self._group.start(self._group.send, payload, self._group.rank + 1), payload
