"""Perplexity of text: exp of the mean loss a token, of the next token or of masked ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isthmus.data import pad_token_id
from isthmus.evaluation.encoding import Encoded, Place, batches, encode
from isthmus.spec.errors import IsthmusError

TOKENS_PER_BATCH = 2048
MASKED_SHARE = 0.15


@torch.no_grad()
def causal_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    seq_len: int,
    place: Place,
) -> float:
    """Texts joined by the end-of-text token and cut into windows of ``seq_len``; the first token of each is given."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    if len(ids) < 2:
        raise IsthmusError("text: holds fewer than two tokens, so there is none to predict")
    windows: list[Encoded] = [
        {"input_ids": np.array(part), "attention_mask": np.ones(len(part), np.int64)}
        for start in range(0, len(ids), seq_len)
        if len(part := ids[start : start + seq_len]) > 1
    ]
    total, num_tokens = 0.0, 0
    for _, batch in batches(windows, TOKENS_PER_BATCH, pad_token_id(tokenizer), place):
        with place.autocast():
            logits = model(**batch, use_cache=False).logits
        is_target = batch["attention_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][is_target]
        total += float(F.cross_entropy(logits[:, :-1][is_target].float(), targets, reduction="sum"))
        num_tokens += len(targets)
    return math.exp(total / num_tokens)


@torch.no_grad()
def masked_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    seq_len: int,
    place: Place,
    seed: int = 0,
) -> float:
    """15 % of the tokens that are not special are masked, the same for every model with this tokenizer."""
    if tokenizer.mask_token_id is None:
        raise IsthmusError("model: its tokenizer has no mask token, so there is no masked perplexity")
    encoded = encode(tokenizer, texts, None, seq_len)
    rng = np.random.default_rng(seed)
    special = np.array(tokenizer.all_special_ids)
    masked, wanted = [], []
    for row in encoded:
        ids = row["input_ids"].copy()
        chosen = (rng.random(len(ids)) < MASKED_SHARE) & ~np.isin(ids, special)
        wanted.append(np.where(chosen, row["input_ids"], -100))
        ids[chosen] = tokenizer.mask_token_id
        masked.append({**row, "input_ids": ids})
    total, num_tokens = 0.0, 0
    for rows, batch in batches(masked, TOKENS_PER_BATCH, pad_token_id(tokenizer), place):
        with place.autocast():
            logits = model(**batch).logits
        for index, row in enumerate(rows):
            places = np.flatnonzero(wanted[row] >= 0)
            targets = torch.from_numpy(wanted[row][places]).to(place.device)
            total += float(F.cross_entropy(logits[index, places].float(), targets, reduction="sum"))
            num_tokens += len(places)
    if not num_tokens:
        raise IsthmusError("text: too short to mask any token of it")
    return math.exp(total / num_tokens)
