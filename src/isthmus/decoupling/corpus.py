"""Text to distil on: tokenised once, a part held out.

An encoder's texts are lines, each with the tokenizer's special tokens; a decoder's are windows of documents that follow
one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from isthmus.data import Record, read_records
from isthmus.spec.errors import IsthmusError

HELD_OUT_SHARE = 0.02
MAX_HELD_OUT = 512
MIN_TEXTS = 16
FEW_TOKENS = 200_000
"""With fewer the copy learns the text instead of the model: measured fidelity on other text suffers."""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Corpus:
    """Texts as token ids, int32 each. No text is in both."""

    texts: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        return sum(text.shape[-1] for text in self.texts)

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
    is_windows: bool,
    more: Sequence[np.ndarray] = (),
    held_out: Sequence[str | Path] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Reads and tokenises ``sources`` (see ``isthmus.data.read_records``): every text in every field is one. ``more``
    texts are tokenised already.

    Lines have at least one word, are cut after ``seq_len`` tokens, and come once each. With ``is_windows`` documents
    are joined by the end-of-text token and cut into windows of ``seq_len``. Held out are the texts of ``held_out``, or
    2 %, at most 512 texts.
    Raises ``IsthmusError`` for what cannot be read, and for fewer than 16 texts. Blocks.
    """

    def read(sources: Sequence[str | Path]) -> Iterator[np.ndarray]:
        records = (record for source in sources for record in read_records(source))
        return _windows(records, tokenizer, seq_len) if is_windows else _lines(records, tokenizer, seq_len, progress)

    texts = [*more, *read(sources)]
    if len(texts) < MIN_TEXTS:
        what = f"windows of {seq_len} tokens" if is_windows else "lines"
        raise IsthmusError(
            f"text: {', '.join(map(str, sources))} gives {len(texts)} {what}, wanted at least {MIN_TEXTS} to train on "
            "some and test on others; give more text"
        )
    if held_out:
        kept = tuple(read(held_out))
        if len(kept) < MIN_TEXTS // 4:
            raise IsthmusError(
                f"eval_text: {', '.join(map(str, held_out))} gives {len(kept)} texts, wanted at least {MIN_TEXTS // 4}"
            )
        return Corpus(texts=tuple(texts), held_out=kept)
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
