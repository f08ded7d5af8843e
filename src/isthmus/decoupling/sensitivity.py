"""Which layers had best stay original: measured, by decoupling one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from isthmus.decoupling.losses import hidden_loss
from isthmus.decoupling.pair import Source, Wanted
from isthmus.decoupling.slicing import fit_weights
from isthmus.spec.errors import IsthmusError
from isthmus.training.batches import Batch

Progress = Callable[[float], None]


@torch.no_grad()
def sensitivities(
    source: Source,
    original: PreTrainedModel,
    wanted: Wanted,
    batches: Sequence[Batch],
    *,
    progress: Progress | None = None,
) -> list[float]:
    """Of each layer: the error at the model's end when this layer alone is decoupled as ``wanted`` says, its slices
    fitted. The error is ``hidden_loss``: 0 for none, 1 for a copy that knows no more than each unit's mean. Blocks."""
    num_layers = source.config.num_hidden_layers
    is_token = [batch["attention_mask"].bool() for batch in batches]
    theirs = _last_hidden(original, batches)
    errors = []
    for layer in range(num_layers):
        rest = tuple(other for other in range(num_layers) if other != layer)
        config = replace(wanted, groups=None, original_layers=rest).config(source.config)
        decoupled = source.decoupled(original, config).to(original.device)  # type: ignore[arg-type]
        fit_weights(original, decoupled, batches)
        ours = _last_hidden(decoupled, batches)
        rows = [
            torch.cat([hidden[chosen] for hidden, chosen in zip(side, is_token, strict=True)])
            for side in (ours, theirs)
        ]
        errors.append(hidden_loss(*rows).item())
        if progress is not None:
            progress((layer + 1) / num_layers)
    return errors


def _last_hidden(model: PreTrainedModel, batches: Sequence[Batch]) -> list[torch.Tensor]:
    return [model.base_model(**batch).last_hidden_state.float() for batch in batches]


def most_sensitive(errors_L: Sequence[float], num_groups: int) -> tuple[int, ...]:
    """The last layer, where all slices meet, and those ``num_groups`` - 1 others that are worst to decouple."""
    if not 1 <= num_groups < len(errors_L):
        raise IsthmusError(f"groups: got {num_groups} for {len(errors_L)} layers, wanted 1 to {len(errors_L) - 1}")
    last = len(errors_L) - 1
    others = sorted(range(last), key=lambda layer: errors_L[layer], reverse=True)[: num_groups - 1]
    return (*sorted(others), last)
