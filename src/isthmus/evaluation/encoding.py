"""Texts as a model reads them: whatever the tokenizer gives (ids, token types), batched by length, on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from isthmus.training.batches import cut

Encoded = dict[str, np.ndarray]
"""``input_ids``, ``attention_mask`` and what else the tokenizer gives, (T,) each."""


def encode(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[str], second: Sequence[str] | None, max_length: int
) -> list[Encoded]:
    """Each text, or pair, cut to ``max_length`` tokens."""
    pairs: dict[str, Any] = {} if second is None else {"text_pair": list(second)}
    columns: Any = tokenizer(list(first), **pairs, truncation=True, max_length=max_length)
    return [{name: np.asarray(values[row], np.int64) for name, values in columns.items()} for row in range(len(first))]


@dataclass(frozen=True)
class Place:
    """Where and how exactly a model computes: ``dtype`` is ``fp32`` or ``bf16`` (weights stay FP32)."""

    device: torch.device
    dtype: str

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")


def batches(
    encoded: Sequence[Encoded], tokens_per_batch: int, pad_token_id: int, place: Place
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """All of ``encoded`` once, shortest first: (which they are, padded tensors)."""
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    for numbers in cut(np.arange(len(encoded)), lengths, tokens_per_batch):
        yield numbers, collate([encoded[number] for number in numbers], pad_token_id, place)


def shuffled(encoded: Sequence[Encoded], batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Which rows make which batch of one epoch: ``batch_size`` of like length each, in random order."""
    order = rng.permutation(len(encoded))
    lengths = np.array([len(row["input_ids"]) for row in encoded])
    chunk = batch_size * 50
    found: list[np.ndarray] = []
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        found += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [found[index] for index in rng.permutation(len(found))]


def collate(rows: Sequence[Encoded], pad_token_id: int, place: Place) -> dict[str, Tensor]:
    """Rows padded on the right to the longest, (B, T) each."""
    length = max(len(row["input_ids"]) for row in rows)
    tensors = {}
    for name in rows[0]:
        padded = np.full((len(rows), length), pad_token_id if name == "input_ids" else 0, np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row[name])] = row[name]
        tensors[name] = torch.from_numpy(padded).to(place.device)
    return tensors
