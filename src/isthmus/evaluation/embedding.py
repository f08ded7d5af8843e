"""Vectors of texts: the mean of the last hidden states over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isthmus.data import pad_token_id
from isthmus.evaluation.encoding import Place, batches, encode

TOKENS_PER_BATCH = 4096


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    place: Place,
    max_length: int = 256,
) -> np.ndarray:
    """(N, H) FP32, in the order of ``texts``. ``model`` may have a head. Blocks."""
    encoded = encode(tokenizer, texts, None, max_length)
    vectors: np.ndarray | None = None
    for numbers, batch in batches(encoded, TOKENS_PER_BATCH, pad_token_id(tokenizer), place):
        with place.autocast():
            hidden_BTH = model.base_model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = ((hidden_BTH.float() * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()
        if vectors is None:
            vectors = np.empty((len(texts), pooled.shape[1]), np.float32)
        vectors[numbers] = pooled
    assert vectors is not None
    return vectors
