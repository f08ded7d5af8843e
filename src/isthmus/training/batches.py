"""Texts as batches of about as many tokens each, those of like length together, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isthmus.spec.errors import IsthmusError

_BATCHES_PER_CHUNK = 50

Batch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, (B, T) int64; ``token_type_ids`` where a text has them."""


class BatchStream:
    """Batches without end, of about ``tokens_per_batch`` tokens each with padding; every text once per epoch.

    A text is its token ids (T,), or (2, T): ids, and token types as pairs of texts have. Texts of like length meet:
    within chunks of 50 batches they are sorted by length, then the batches are shuffled. The same arguments give the
    same batches. Of several processes each takes every ``num_parts``-th batch, from ``part``.

    ``crossed_share`` of the texts of a batch go on with the rest of another text of that batch from some token on
    (``crossed``), then ``replaced_share`` of the tokens become other tokens of that batch (``replaced``), anew in each
    epoch: for labels that are computed from whatever comes.
    """

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        *,
        tokens_per_batch: int,
        pad_token_id: int,
        seed: int,
        part: int = 0,
        num_parts: int = 1,
        crossed_share: float = 0.0,
        replaced_share: float = 0.0,
    ) -> None:
        self._texts = texts
        self._lengths = np.array([text.shape[-1] for text in texts])
        self._tokens_per_batch, self._pad_token_id, self._seed = tokens_per_batch, pad_token_id, seed
        self._part, self._num_parts = part, num_parts
        self._crossed_share, self._replaced_share = crossed_share, replaced_share
        self._epoch = self._position = 0
        self._batches = self._shuffled()

    def next(self) -> Batch:
        """The next batch. Advances the stream."""
        while self._position + self._part >= len(self._batches):
            self._epoch, self._position = self._epoch + 1, 0
            self._batches = self._shuffled()
        place = self._position + self._part
        self._position += self._num_parts
        texts = [self._texts[number] for number in self._batches[place]]
        rng = np.random.default_rng([self._seed, 2, self._epoch, place])
        if self._crossed_share:
            texts = crossed(texts, self._crossed_share, rng)
        if self._replaced_share:
            texts = replaced(texts, self._replaced_share, rng)
        return collate(texts, self._pad_token_id)

    def state(self) -> dict[str, int]:
        """What ``restore`` needs to go on with the very next batch; plain JSON."""
        return {"epoch": self._epoch, "position": self._position, "num_texts": len(self._texts), "seed": self._seed}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on where ``state`` was taken. Raises ``IsthmusError`` for that of other text or another seed."""
        if (state["num_texts"], state["seed"]) != (len(self._texts), self._seed):
            raise IsthmusError(
                f"resume: the checkpoint is of {state['num_texts']} texts and seed {state['seed']}, this run of "
                f"{len(self._texts)} and {self._seed}; resume with the same --text, --seq-len and --seed"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._batches = self._shuffled()

    def _shuffled(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed, 1, self._epoch])
        order = rng.permutation(len(self._texts))
        mean = max(1.0, float(self._lengths.mean()))
        chunk = max(1, round(_BATCHES_PER_CHUNK * self._tokens_per_batch / mean))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), chunk):
            batches += cut(order[start : start + chunk], self._lengths, self._tokens_per_batch)
        # A whole number of rounds, so that all processes take equally many.
        num_whole = max(1, len(batches) // self._num_parts) * self._num_parts
        return [batches[index % len(batches)] for index in rng.permutation(max(len(batches), num_whole))[:num_whole]]


def crossed(texts: Sequence[np.ndarray], share: float, rng: np.random.Generator) -> list[np.ndarray]:
    """``texts``, of which about ``share`` have the beginning of one and the rest of another (or of the same) text: the
    first and the last token, which may be special, come from a first and a last."""
    others = rng.permutation(len(texts))
    drawn, places = rng.random(len(texts)), rng.random(len(texts))
    result = []
    for text, other, chance, place in zip(texts, others, drawn, places, strict=True):
        rest = texts[other]
        shorter = min(text.shape[-1], rest.shape[-1])
        if chance < share and shorter > 1 and text.ndim == rest.ndim:
            first = 1 + int(place * (shorter - 1))
            text = np.concatenate([text[..., :first], rest[..., first:]], axis=-1)
        result.append(text)
    return result


def replaced(texts: Sequence[np.ndarray], share: float, rng: np.random.Generator) -> list[np.ndarray]:
    """``texts``, of whose tokens about ``share`` are any of ``texts``' instead; first and last ones, which may be
    special, stay and are put nowhere. Token types stay."""
    inner = np.concatenate([np.atleast_2d(text)[0, 1:-1] for text in texts])
    result = []
    for text in texts:
        text = text.copy()
        ids = text if text.ndim == 1 else text[0]
        [places] = np.nonzero(rng.random(max(0, len(ids) - 2)) < share)
        if len(places):
            ids[1 + places] = rng.choice(inner, len(places))
        result.append(text)
    return result


def cut(numbers: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """``numbers`` sorted by length and cut such that no batch, padded, has more than ``tokens_per_batch`` tokens (a
    longer text is a batch of its own)."""
    ordered = numbers[np.argsort(lengths[numbers], kind="stable")]
    batches, start = [], 0
    for end in range(1, len(ordered) + 1):
        is_full = end < len(ordered) and (end - start + 1) * lengths[ordered[end]] > tokens_per_batch
        if is_full or end == len(ordered):
            batches.append(ordered[start:end])
            start = end
    return batches


def collate(texts: Sequence[np.ndarray], pad_token_id: int) -> Batch:
    """The batch of some texts, padded on the right."""
    shape = (len(texts), max(text.shape[-1] for text in texts))
    columns = {"input_ids": np.full(shape, pad_token_id, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    if any(text.ndim == 2 for text in texts):
        columns["token_type_ids"] = np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        ids, *types = np.atleast_2d(text)
        columns["input_ids"][row, : len(ids)] = ids
        columns["attention_mask"][row, : len(ids)] = 1
        if types:
            columns["token_type_ids"][row, : len(ids)] = types[0]
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def fixed_batches(texts: Sequence[np.ndarray], tokens_per_batch: int, pad_token_id: int) -> list[Batch]:
    """All of ``texts`` once, in batches by length."""
    lengths = np.array([text.shape[-1] for text in texts])
    batches = cut(np.arange(len(texts)), lengths, tokens_per_batch)
    return [collate([texts[number] for number in numbers], pad_token_id) for numbers in batches]
