"""An orthogonal change of the hidden units' basis, after which every slice sees something of everything that matters.

RMSNorm does not know the basis: with its weights folded into what reads it, any orthogonal Q can be put between the
residual stream and all matrices, and the model computes what it did (Ashkboos et al. 2024, section 3). Slices of
principal components would be worth as much as their variance, no more, since components tell nothing of each other.
Here a strong component is dealt to all slices instead: N components, one strong and N - 1 weak ones, are mixed by an
orthogonal matrix whose first column is constant, so each slice sees the strong one with 1/N of its variance, beside
little noise. Slices' norms come near the whole's too.

LayerNorm takes a mean over units, and post-norm adds before it: those models keep their basis.

Shapes: H hidden units, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from isthmus.decoupling.roles import halves_of
from isthmus.decoupling.walking import calls_of
from isthmus.models.decoupled.architectures import layers_of
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write

BASES = ("auto", "shared", "kept")
"""``shared``: changed as above, ``kept``: as it is, ``auto``: shared where that takes no more weights."""
_RMS_NORM = ("llama", "mistral", "qwen2", "qwen3")


def wants_shared(basis: str, model: PreTrainedModel) -> bool:
    """Whether the basis is to be changed. Raises ``IsthmusError`` where it cannot be."""
    is_free = model.config.model_type in _RMS_NORM and model.get_output_embeddings() is not None
    if basis == "shared" and not is_free:
        raise IsthmusError(
            f"basis: shared needs a language model with RMSNorm ({', '.join(_RMS_NORM)}), and this one is a "
            f"{type(model).__name__}; take --basis kept"
        )
    return is_free and (basis == "shared" or (basis == "auto" and not is_tied(model)))


def share_basis(
    model: PreTrainedModel,
    widths: Sequence[int],
    layers: Sequence[int],
    batches: Sequence[Mapping[str, Tensor]],
    path: Path,
) -> None:
    """Changes ``model`` to its ``shared_basis``, or to the one kept in ``path``, where it is kept. Under torchrun every
    process calls this and takes that of rank 0."""
    device = model.device
    basis = torch.zeros(sum(widths), sum(widths), device=device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        if path.is_file():
            basis = load(path.read_bytes())["basis"].to(device)
        else:
            basis = shared_basis(model, widths, layers, batches).contiguous()
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, save({"basis": basis.cpu()}))
    if dist.is_initialized():
        dist.broadcast(basis, 0)
    change_basis(model, basis)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether one table is both embeddings and head. The last norm's weights are folded into the head, so it cannot
    stay one."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight  # type: ignore[union-attr]


@torch.no_grad()
def shared_basis(
    model: PreTrainedModel, widths: Sequence[int], layers: Sequence[int], batches: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Q (H, H), FP32, orthogonal: hidden units are to become Qᵀ h. From what ``layers``, those that are to be decoupled
    into slices of ``widths``, read on ``batches``. Blocks for about as long as the model takes to read them."""
    covariance = _covariance(model, set(layers), batches)
    _, components = torch.linalg.eigh(covariance)
    return components.flip(1).float() @ dealt(widths).to(covariance.device)


def _covariance(model: PreTrainedModel, layers: set[int], batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Mean of x xᵀ over tokens and ``layers``, x being a layer's input by its root mean square, (H, H) FP64."""
    total, num_rows = None, 0
    calls = calls_of(model, batches)
    for number, layer in enumerate(layers_of(model)):
        for call in calls:
            if number in layers:
                rows = call.rows(call.hidden).double()
                rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
                product = rows.T @ rows
                total = product if total is None else total + product
                num_rows += len(rows)
            call.hidden = call.run(layer)
    assert total is not None
    return total / num_rows


def dealt(widths: Sequence[int]) -> Tensor:
    """Which mixture of components, strongest first, each unit of each slice becomes: (H, H), orthogonal.

    Round j deals to the slices that have more than j units one component of the strong half each round, and as many
    weak ones as there are further slices.
    """
    num_units, starts = sum(widths), [sum(widths[:place]) for place in range(len(widths))]
    rounds = [[start + j for start, width in zip(starts, widths, strict=True) if width > j] for j in range(max(widths))]
    weak = iter(range(num_units - 1, len(rounds) - 1, -1))  # the weakest beside the strongest
    mixing = torch.zeros(num_units, num_units)
    for strong, units in enumerate(rounds):
        components = [strong, *(next(weak) for _ in units[1:])]
        mixing[torch.tensor(components)[:, None], torch.tensor(units)] = _cosines(len(units)).T
    return mixing


def _cosines(size: int) -> Tensor:
    """The orthogonal cosine transform, (size, size); its first column is constant."""
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    matrix = torch.cos(math.pi * (2 * rows + 1) * columns / (2 * size)) * math.sqrt(2 / size)
    matrix[:, 0] = size**-0.5
    return matrix


@torch.no_grad()
def change_basis(model: PreTrainedModel, basis_HH: Tensor) -> None:
    """Changes the weights of ``model`` so that its hidden units are ``basis_HH``ᵀ times what they were; what it
    computes stays. A head that shared the embeddings' table gets one of its own (``tie_word_embeddings`` is False)."""
    body: Any = model.base_model
    head: Any = model.get_output_embeddings()
    if is_tied(model):
        head.weight = torch.nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False
    embeddings = body.embed_tokens.weight
    embeddings.copy_(embeddings @ basis_HH)
    for layer in layers_of(model):
        for half in halves_of(layer):
            for matrix in half.reading:
                matrix.copy_((matrix * half.norm.weight) @ basis_HH)
            half.norm.weight.fill_(1.0)
            half.writing.copy_(basis_HH.T @ half.writing)
            writer: Any = half.writer
            if writer.bias is not None:
                writer.bias.copy_(basis_HH.T @ writer.bias)
    head.weight.copy_((head.weight * body.norm.weight) @ basis_HH)
    body.norm.weight.fill_(1.0)
