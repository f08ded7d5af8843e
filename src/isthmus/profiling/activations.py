"""Bytes that one micro-batch's dense part keeps from forward for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel, bound_parameters, on_device
from isthmus.profiling.dense import Forward, loss_of, no_experts


def measure_saved_bytes(model: MoeModel, inputs: dict[str, Tensor], run: Forward = loss_of) -> int:
    """Runs the dense part forward once and counts what autograd saves, each storage once, parameters left out.

    ``inputs``: a micro-batch with labels; dense units must be bound. Replaces the model's experts function. Blocks.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in bound_parameters(model)}
    # Held, not only counted: what part of the graph gives back at once must not lend its address to what comes next.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    model.set_experts_function(no_experts)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        device = next(bound_parameters(model)).device
        loss = run(model, on_device(inputs, device))
    total = sum(storage.nbytes() for storage in saved.values())
    del loss
    return total
