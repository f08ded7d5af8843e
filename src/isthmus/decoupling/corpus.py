"""Text to distil on: tokenised once, a part held out, cut into batches of about as many tokens each.

An encoder's texts are lines, each with the tokenizer's special tokens; a decoder's are windows of documents that follow
one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from isthmus.data import Record, read_records
from isthmus.spec.errors import IsthmusError

HELD_OUT_SHARE = 0.02
MAX_HELD_OUT = 512
MIN_TEXTS = 16
FEW_TOKENS = 200_000
"""With fewer the copy learns the text instead of the model: measured fidelity on other text suffers."""
_BATCHES_PER_CHUNK = 50

Progress = Callable[[float], None]
Batch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, (B, T) int64."""


@dataclass(frozen=True)
class Corpus:
    """Texts as token ids, int32 each. No text is in both."""

    texts: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def warning(self) -> str | None:
        """What to tell the user of a corpus that is too small to distil well."""
        if self.num_tokens >= FEW_TOKENS:
            return None
        return (
            f"text: {self.num_tokens:,} tokens are few to distil on: the copy will follow the model on this text and "
            f"less well on other text. Wanted {FEW_TOKENS:,} or more, of the kind that the model is used on."
        )


def read_corpus(
    sources: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    is_causal: bool,
    seed: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Reads and tokenises ``sources`` (see ``isthmus.data.read_records``): every text in every field is one.

    Encoders: each line of at least one word, cut after ``seq_len`` tokens, no line twice. Decoders: documents joined by
    the end-of-text token and cut into windows of ``seq_len``. Held out is a share of 2 %, at most 512 texts.
    Raises ``IsthmusError`` for what cannot be read, and for fewer than 16 texts. Blocks.
    """
    records = (record for source in sources for record in read_records(source))
    texts = list(_windows(records, tokenizer, seq_len) if is_causal else _lines(records, tokenizer, seq_len, progress))
    if len(texts) < MIN_TEXTS:
        what = f"windows of {seq_len} tokens" if is_causal else "lines"
        raise IsthmusError(
            f"text: {', '.join(map(str, sources))} gives {len(texts)} {what}, wanted at least {MIN_TEXTS} to train on "
            "some and test on others; give more text"
        )
    num_held_out = min(MAX_HELD_OUT, max(MIN_TEXTS // 4, round(len(texts) * HELD_OUT_SHARE)))
    order = np.random.default_rng([seed, 0]).permutation(len(texts))
    return Corpus(
        texts=tuple(texts[index] for index in order[num_held_out:]),
        held_out=tuple(texts[index] for index in order[:num_held_out]),
    )


def _lines(records: Iterable[Record], tokenizer: Any, seq_len: int, progress: Progress | None) -> Iterator[np.ndarray]:
    seen: set[str] = set()
    batch: list[str] = []
    for record in records:
        for value in record.fields.values():
            for line in value.splitlines() if isinstance(value, str) else ():
                line = line.strip()
                if any(character.isalpha() for character in line) and line not in seen:
                    seen.add(line)
                    batch.append(line)
        if len(batch) >= 1000:
            yield from _encode(batch, tokenizer, seq_len)
            batch = []
            if progress is not None:
                progress(record.share_read)
    yield from _encode(batch, tokenizer, seq_len)


def _encode(texts: list[str], tokenizer: Any, seq_len: int) -> Iterator[np.ndarray]:
    if texts:
        for token_ids in tokenizer(texts, truncation=True, max_length=seq_len)["input_ids"]:
            yield np.asarray(token_ids, np.int32)


def _windows(records: Iterable[Record], tokenizer: Any, seq_len: int) -> Iterator[np.ndarray]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rest: list[int] = []
    for record in records:
        for value in record.fields.values():
            if isinstance(value, str) and value.strip():
                rest += tokenizer(value, add_special_tokens=False)["input_ids"] + end
        first = 0
        for first in range(0, len(rest) - seq_len + 1, seq_len):
            yield np.asarray(rest[first : first + seq_len], np.int32)
        rest = rest[len(rest) // seq_len * seq_len :]


class BatchStream:
    """Batches without end, of about ``tokens_per_batch`` tokens each with padding; every text once per epoch.

    Texts of like length meet: within chunks of 50 batches they are sorted by length, then the batches are shuffled. The
    same arguments give the same batches. Of several processes each takes every ``num_parts``-th batch, from ``part``.
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
    ) -> None:
        self._texts = texts
        self._lengths = np.array([len(text) for text in texts])
        self._tokens_per_batch, self._pad_token_id, self._seed = tokens_per_batch, pad_token_id, seed
        self._part, self._num_parts = part, num_parts
        self._epoch = self._position = 0
        self._batches = self._shuffled()

    def next(self) -> Batch:
        """The next batch. Advances the stream."""
        while self._position + self._part >= len(self._batches):
            self._epoch, self._position = self._epoch + 1, 0
            self._batches = self._shuffled()
        numbers = self._batches[self._position + self._part]
        self._position += self._num_parts
        return collate([self._texts[number] for number in numbers], self._pad_token_id)

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
    """``input_ids`` and ``attention_mask`` of texts, padded on the right."""
    shape = (len(texts), max(map(len, texts)))
    input_ids_BT, mask_BT = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
    for row, text in enumerate(texts):
        input_ids_BT[row, : len(text)] = text
        mask_BT[row, : len(text)] = 1
    return {"input_ids": torch.from_numpy(input_ids_BT), "attention_mask": torch.from_numpy(mask_BT)}


def fixed_batches(texts: Sequence[np.ndarray], tokens_per_batch: int, pad_token_id: int) -> list[Batch]:
    """All of ``texts`` once, in batches by length."""
    lengths = np.array([len(text) for text in texts])
    batches = cut(np.arange(len(texts)), lengths, tokens_per_batch)
    return [collate([texts[number] for number in numbers], pad_token_id) for numbers in batches]
