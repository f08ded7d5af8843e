"""Which parameter of a decoupled model, or of its original, is stepped by which optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from isthmus.decoupling.roles import halves_of
from isthmus.decoupling.slicing import is_decoupled_layer
from isthmus.models.decoupled.architectures import layers_of
from isthmus.training.muon import BlockMuon

BETAS = (0.9, 0.98)
Cut = tuple[int, tuple[int, ...]] | None
"""(dimension, sizes) of the independent parts of a matrix; None: it is one."""


def optimizers_of(
    model: PreTrainedModel, *, matrix_factor: float, weight_decay: float, beside: Sequence[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """``BlockMuon`` for the layers' matrices, sub-block by sub-block, AdamW for tables, norms, biases, heads and what
    is trained ``beside`` the model.

    Groups have an ``lr_factor``: ``matrix_factor`` for matrices, 1 for the rest. With 0 all is AdamW's.
    """
    cuts: dict[Cut, list[nn.Parameter]] = defaultdict(list)
    if matrix_factor:
        for layer in layers_of(model):
            for parameter, cut in _matrices(layer):
                cuts[cut].append(parameter)
    matrices = {parameter for parameters in cuts.values() for parameter in parameters}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in matrices]
    rest += beside
    adamw = torch.optim.AdamW([{"params": rest, "lr_factor": 1.0}], betas=BETAS, weight_decay=weight_decay, fused=True)
    if not matrices:
        return [adamw]
    groups = [{"params": members, "parts": cut, "lr_factor": matrix_factor} for cut, members in cuts.items()]
    return [adamw, BlockMuon(groups, weight_decay=weight_decay)]


def _matrices(layer: Any) -> list[tuple[nn.Parameter, Cut]]:
    """The layer's matrices: what reads hidden units is cut along its inputs, what writes them along its outputs."""
    found: list[tuple[nn.Parameter, Cut]] = []
    for half in halves_of(layer):
        for module in (*half.readers, half.writer):
            weight: Any = module.weight
            if not is_decoupled_layer(layer):
                found.append((weight, None))
                continue
            out_dim = 0 if isinstance(module, nn.Linear) else 1
            num, widths = layer.slices.num, layer.slices.widths
            if module is half.writer:
                cut = (out_dim, widths)
            elif weight.shape[1 - out_dim] == sum(widths):
                cut = (1 - out_dim, widths)
            else:  # heads of their own: each sub-block's matrix is below the one before
                cut = (out_dim, (weight.shape[out_dim] // num,) * num)
            found.append((weight, cut))
    return found
