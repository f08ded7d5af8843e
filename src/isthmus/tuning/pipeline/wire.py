"""What tensors look like between processes: as they are, or hidden states encoded by a codec of ``transport``."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from isthmus.transport.codec import Codec, create_codec
from isthmus.tuning.pipeline.links import Form

WIRES = ("bf16", "int8")
"""Codecs with which training goes on as without. Coarser ones are for requests, whose errors do not add up."""


class Wire:
    """Encodes hidden states and their gradients, (batch, tokens, hidden size), where that makes them smaller. All else
    stays as it is: router logits, which are few, and attention's masks and biases, whose −max no codec would carry.

    Its codec's memory is one thread's. ``codec`` None: nothing is encoded.
    """

    def __init__(self, codec: str | None, hidden_size: int) -> None:
        self._codec = create_codec(codec) if codec is not None else None
        self._hidden_size = hidden_size

    def message(self, form: Form) -> Form:
        """As what a tensor of ``form`` travels: the same on both sides."""
        codec = self._codec_of(form)
        return Form((codec.num_bytes(prod(form.shape)),), torch.uint8) if codec is not None else form

    def pack(self, value: Tensor) -> Tensor:
        """The message for ``value``, on the CPU if it was encoded. A nan or an infinity makes nan of its block."""
        codec = self._codec_of(form_of(value))
        if codec is None:
            return value
        message = torch.empty(self.message(form_of(value)).shape, dtype=torch.uint8)
        codec.encode(value.detach().to("cpu", torch.float32).contiguous(), message)
        return message

    def unpack(self, message: Tensor, form: Form) -> Tensor:
        """The tensor of ``form`` that ``message`` stands for."""
        codec = self._codec_of(form)
        if codec is None:
            return message
        values = torch.empty(form.shape)
        codec.decode(message.cpu(), values)
        return values.to(form.dtype)

    def _codec_of(self, form: Form) -> Codec | None:
        if self._codec is None or len(form.shape) != 3 or form.shape[-1] != self._hidden_size:
            return None
        num_values = prod(form.shape)
        return self._codec if self._codec.num_bytes(num_values) < num_values * form.dtype.itemsize else None


def form_of(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.dtype)
