"""One model learns to give what another gives, on unlabelled text: the pair, a step, and how faithful the copy is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from isthmus.decoupling.corpus import Batch
from isthmus.decoupling.losses import LossWeights, divergence, hidden_losses, pool, pooled_losses
from isthmus.models.decoupled import layers_of


@dataclass(frozen=True)
class Faithfulness:
    """The copy beside the original on text held out. Encoders: ``cosine`` and ``spearman`` of pooled vectors; decoders:
    mean loss in nats of both."""

    loss: float
    cosine: float | None = None
    their_loss: float | None = None


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """bf16 where ``dtype`` says so; weights stay FP32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


class Distiller:
    """``original`` and ``decoupled`` side by side: what one batch costs, and how far apart they are.

    Both are of one family and on one device; ``original`` has a language-model head where ``decoupled`` has one.
    """

    def __init__(
        self, original: PreTrainedModel, decoupled: PreTrainedModel, *, weights: LossWeights, dtype: str
    ) -> None:
        self.original, self.decoupled = original.eval(), decoupled
        self.weights, self.dtype = weights, dtype
        self.device = next(decoupled.parameters()).device
        self.is_causal = hasattr(original, "lm_head") and not hasattr(original.config, "type_vocab_size")
        originals = decoupled.config.decoupling.original_layers
        num_layers = len(layers_of(decoupled))
        self._layer_weights = [
            weights.original if layer in originals else weights.decoupled for layer in range(num_layers)
        ]
        for parameter in original.parameters():
            parameter.requires_grad_(False)

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of one batch, a scalar with a gradient."""
        with autocast(self.device, self.dtype):
            with torch.no_grad():
                theirs = self._run(self.original, batch)
            ours = self._run(self.decoupled, batch)
        is_token = batch["attention_mask"].bool()
        total = hidden_losses(ours.hidden_states[1:], theirs.hidden_states[1:], is_token, self._layer_weights)
        if self.is_causal:
            return total + self.weights.logits * divergence(ours.logits[is_token], theirs.logits[is_token])
        mask = batch["attention_mask"]
        ours_BH, theirs_BH = (pool(output.hidden_states[-1].float(), mask) for output in (ours, theirs))
        cosine, pairs = pooled_losses(ours_BH, theirs_BH)
        return total + self.weights.pooled * cosine + self.weights.pairs * pairs

    def _run(self, model: PreTrainedModel, batch: Batch) -> Any:
        options = {"use_cache": False} if self.is_causal else {}
        return model(**batch, output_hidden_states=True, **options)

    @torch.no_grad()
    def embed(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Tensor:
        """Pooled vectors of all texts, (N, H) FP32."""
        rows = []
        for batch in batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with autocast(self.device, self.dtype):
                hidden = model.base_model(**batch).last_hidden_state
            rows.append(pool(hidden.float(), batch["attention_mask"]))
        return torch.cat(rows)
