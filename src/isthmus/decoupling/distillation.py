"""One model learns to give what another gives, on unlabelled text: the pair, a step, and how faithful the copy is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from isthmus.decoupling.losses import LossWeights, divergence, hidden_losses, pool, pooled_losses
from isthmus.decoupling.maps import identity_map, map_words
from isthmus.evaluation.fidelity import fidelity
from isthmus.models.decoupled.architectures import auto_class_of, layers_of
from isthmus.training.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """The copy beside the original on text held out. Encoders: ``cosine`` and ``spearman`` of pooled vectors
    (``Fidelity``); ``loss`` is 1 - ``spearman``. Decoders, in nats a token: ``loss`` of the copy, ``original_loss``,
    and the mean Kullback–Leibler ``divergence`` of the copy's predictions from the original's."""

    loss: float
    cosine: float | None = None
    spearman: float | None = None
    original_loss: float | None = None
    divergence: float | None = None

    def describe(self) -> str:
        """One line for people."""
        if self.original_loss is None:
            return f"cosine {self.cosine:.4f}, Spearman {self.spearman:.4f}"
        ratio = math.exp(self.loss - self.original_loss)
        return f"perplexity {math.exp(self.loss):.3f}, {ratio:.3f} times the original's"


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """bf16 where ``dtype`` says so; weights stay FP32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


class Distiller:
    """``original`` and ``decoupled`` side by side: what one batch costs, and how far apart they are.

    Both are of one family and on one device, with the same head or none: that of a language model or of a classifier
    is distilled too. An encoder's tables of embeddings stay the original's, but for one map of all words; ``maps``, to
    be trained with the copy, turn its hidden states into what is compared (see ``isthmus.decoupling.maps``).
    """

    def __init__(
        self,
        original: PreTrainedModel,
        decoupled: PreTrainedModel,
        *,
        weights: LossWeights | None = None,
        dtype: str = "bf16",
    ) -> None:
        weights = weights or LossWeights()
        self.original, self.decoupled = original.eval(), decoupled
        self.weights, self.dtype = weights, dtype
        self.is_causal = hasattr(original, "lm_head") and not hasattr(original.config, "type_vocab_size")
        self.is_classifier = auto_class_of(original.config) == "AutoModelForSequenceClassification"
        originals = decoupled.config.decoupling.original_layers
        num_layers = len(layers_of(decoupled))
        self._layer_weights = [
            weights.original if layer in originals else weights.decoupled for layer in range(num_layers)
        ]
        self._original_result: Any = None
        self.maps = nn.ModuleList()
        """One a layer but the last, of encoders."""
        for parameter in original.parameters():
            parameter.requires_grad_(False)
        if not self.is_causal:  # trained, they learn the text by heart: docs/log.md
            for module in decoupled.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.requires_grad_(False)
            map_words(decoupled)
            size: Any = decoupled.config.hidden_size
            self.maps.extend(identity_map(size) for _ in range(num_layers - 1))
            self.maps.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.decoupled.parameters()).device

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of one batch, a scalar with a gradient. Nothing is dropped out: the original drops nothing
        either, and what it computes is no label that could be learnt by heart."""
        self.decoupled.eval()
        with autocast(self.device, self.dtype):
            with torch.no_grad():
                theirs = self._run(self.original, batch)
            ours = self._run(self.decoupled, batch)
            is_token = batch["attention_mask"].bool()
            our_states = [state[is_token] for state in ours.hidden_states[1:]]
            for layer, map_of_layer in enumerate(self.maps):
                our_states[layer] = map_of_layer(our_states[layer])
        their_states = [state[is_token] for state in theirs.hidden_states[1:]]
        total = hidden_losses(our_states, their_states, self._layer_weights)
        if self.is_causal:
            return total + self.weights.logits * divergence(ours.logits[is_token], theirs.logits[is_token])
        mask = batch["attention_mask"]
        ours_BH, theirs_BH = (pool(output.hidden_states[-1].float(), mask) for output in (ours, theirs))
        cosine, pairs = pooled_losses(ours_BH, theirs_BH)
        if self.is_classifier:
            total = total + self.weights.logits * divergence(ours.logits, theirs.logits)
        return total + self.weights.pooled * cosine + self.weights.pairs * pairs

    def _run(self, model: PreTrainedModel, batch: Batch) -> Any:
        options = {"use_cache": False} if self.is_causal else {}
        return model(**batch, output_hidden_states=True, **options)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Faithfulness:
        """How like the original the copy is on ``batches``. The original's side is computed once."""
        self.decoupled.eval()
        if self.is_causal:
            return self._compare_predictions(batches)
        if self._original_result is None:
            self._original_result = self._embed(self.original, batches)
        result = fidelity(self._original_result, self._embed(self.decoupled, batches))
        return Faithfulness(loss=1 - result.spearman, cosine=result.cosine, spearman=result.spearman)

    def _embed(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Any:
        rows = []
        for batch in batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with autocast(self.device, self.dtype):
                hidden = model.base_model(**batch).last_hidden_state
            rows.append(pool(hidden.float(), batch["attention_mask"]))
        return torch.cat(rows).cpu().numpy()

    def _compare_predictions(self, batches: Sequence[Batch]) -> Faithfulness:
        """Both models' mean loss, and the mean divergence between them, in nats a token."""
        sums, num_tokens = torch.zeros(3, dtype=torch.float64), 0
        for batch in batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            is_target = batch["attention_mask"][:, 1:].bool()
            targets = batch["input_ids"][:, 1:][is_target]
            with autocast(self.device, self.dtype):
                ours, theirs = (
                    model(**batch, use_cache=False).logits[:, :-1][is_target].float()
                    for model in (self.decoupled, self.original)
                )
            losses = [F.cross_entropy(logits, targets) for logits in (ours, theirs)]
            sums += torch.stack([*losses, divergence(ours, theirs)]).cpu().double() * len(targets)
            num_tokens += len(targets)
        loss, original_loss, distance = (sums / num_tokens).tolist()
        return Faithfulness(loss=loss, original_loss=original_loss, divergence=distance)
