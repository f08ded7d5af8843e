"""Tokenised training data in memory: one flat array of tokens, and where its examples begin."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from isthmus.data.record import Record
from isthmus.data.records import read_records
from isthmus.data.tokenizer import load_tokenizer, pad_token_id
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data.encoding import Encoder, Example
from isthmus.tuning.data.fields import interpret, parse_columns
from isthmus.tuning.data.fitting import Fitter

MIN_SEQ_LEN = 8
BATCH_RECORDS = 1000
BATCH_CHARS = 1 << 22

Progress = Callable[[float], None]
"""Called now and then while data is loaded, with the share of the source that is done: 0 … 1."""


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """What became of the records."""

    num_records: int
    num_examples: int
    num_tokens: int
    num_label_tokens: int
    num_split: int
    """Documents longer than ``seq_len``, now in pieces."""
    num_truncated: int
    """Examples that lost the left of their prompt."""
    num_too_long: int
    """Examples left out: what is to be predicted does not fit ``seq_len``."""
    num_without_labels: int
    """Records left out: an empty text or completion, no assistant turn."""
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{self.num_records:,} records",
            f"{self.num_examples:,} examples",
            f"{self.num_tokens:,} tokens ({self.num_label_tokens:,} to predict)",
        ]
        for count, what in (
            (self.num_split, "documents split"),
            (self.num_truncated, "prompts truncated"),
            (self.num_too_long, "too long, left out"),
            (self.num_without_labels, "with nothing to predict, left out"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return "; ".join([", ".join(parts), *self.notes])


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDataset:
    """Examples of at most ``seq_len`` tokens. Example ``i`` is ``offsets[i]:offsets[i + 1]`` of the flat arrays.

    ``token_ids`` (T,) int32; ``is_label`` (T,) bool, which tokens are to be predicted; ``offsets`` (N + 1,) int64.
    With an encoder, the tokens of an example that are to be predicted are the decoder's, those before them the
    encoder's (each at most ``seq_len``). Every example has at least one token that counts.
    """

    token_ids: np.ndarray
    is_label: np.ndarray
    offsets: np.ndarray
    seq_len: int
    pad_token_id: int
    is_encoder_decoder: bool
    summary: LoadSummary

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, which are to be predicted) of example ``number``: views, not copies."""
        where = slice(self.offsets[number], self.offsets[number + 1])
        return self.token_ids[where], self.is_label[where]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (N,) int64."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Tells data sets apart: same records, tokenizer and ``seq_len``, same fingerprint."""
        # Lengths, not tokens: some chat templates write today's date, and a run must resume tomorrow.
        return f"{len(self)}-{self.seq_len}-{zlib.crc32(self.offsets.tobytes()):08x}"


class _Collector:
    """Gathers the fitted examples of one record after the other in flat buffers, and counts."""

    def __init__(self, fitter: Fitter) -> None:
        self._fitter = fitter
        self.token_ids = array("i")
        self.is_label = bytearray()
        self.offsets = array("q", [0])
        self.num_records = self.num_without_labels = 0
        self.num_split = self.num_truncated = self.num_too_long = 0
        self.num_label_tokens = 0
        self.least_seq_len: int | None = None

    def add(self, examples: Sequence[Example]) -> None:
        self.num_records += 1
        # A decoder's first token has nothing before it to be predicted from.
        first = 0 if self._fitter.is_encoder_decoder else 1
        counted = [example for example in examples if example.is_label[first:].any()]
        self.num_without_labels += not counted
        for example in counted:
            pieces = self._fitter.fit(example)
            if not pieces:
                self.num_too_long += 1
                needed = self._fitter.num_tokens_needed(example)
                self.least_seq_len = min(needed, self.least_seq_len or needed)
            elif len(pieces) > 1:
                self.num_split += 1
            elif len(pieces[0].token_ids) < self._fitter.num_whole_tokens(example):
                self.num_truncated += 1
            for piece in pieces:
                self.token_ids.frombytes(piece.token_ids.tobytes())
                self.is_label += piece.is_label.tobytes()
                self.offsets.append(len(self.token_ids))
                self.num_label_tokens += int(piece.is_label[first:].sum())

    def summary(self, notes: tuple[str, ...]) -> LoadSummary:
        return LoadSummary(
            num_records=self.num_records,
            num_examples=len(self.offsets) - 1,
            num_tokens=len(self.token_ids),
            num_label_tokens=self.num_label_tokens,
            num_split=self.num_split,
            num_truncated=self.num_truncated,
            num_too_long=self.num_too_long,
            num_without_labels=self.num_without_labels,
            notes=notes,
        )


def load_dataset_for(
    path: Path,
    config: PretrainedConfig,
    source: str | Path,
    *,
    seq_len: int,
    columns: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> TokenDataset:
    """``load_dataset`` with the tokenizer of the checkpoint at ``path``. Raises ``IsthmusError`` also where it makes
    tokens that the model of ``config`` does not know."""
    is_encoder_decoder, tokenizer = bool(config.is_encoder_decoder), load_tokenizer(path)
    dataset = load_dataset(
        source, tokenizer, seq_len=seq_len, columns=columns, is_encoder_decoder=is_encoder_decoder, progress=progress
    )
    vocab_size = config.get_text_config().vocab_size
    if (largest := int(dataset.token_ids.max())) >= vocab_size:
        raise IsthmusError(
            f"tokenizer: the one in {path} makes token {largest} of {source}, but the model's vocab_size is "
            f"{vocab_size}; put the model's own tokenizer there."
        )
    return dataset


def load_dataset(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    columns: str | Sequence[str] | None = None,
    is_encoder_decoder: bool = False,
    progress: Progress | None = None,
) -> TokenDataset:
    """Reads, tokenises and fits ``source`` (see ``read_records``, ``interpret``, ``Encoder`` and ``Fitter``). Blocks.

    The same source, tokenizer and arguments give the same data set. ``columns`` is ``question,answer`` or the names
    one by one. Raises ``IsthmusError`` for anything wrong with the data, and if nothing is left to train on.
    """
    if seq_len < MIN_SEQ_LEN:
        raise IsthmusError(f"seq_len: got {seq_len}, wanted at least {MIN_SEQ_LEN}; 512 is a good start")
    names = parse_columns(columns)
    encoder = Encoder(tokenizer, is_encoder_decoder=is_encoder_decoder)
    fitter = Fitter(
        seq_len=seq_len,
        is_encoder_decoder=is_encoder_decoder,
        source_frame=encoder.source_frame,
        target_frame=encoder.target_frame,
    )
    collector = _Collector(fitter)
    for records in _batches(read_records(source)):
        for examples in encoder.encode([interpret(record, names) for record in records]):
            collector.add(examples)
        if progress is not None:
            progress(records[-1].share_read)
    has_eos = tokenizer.eos_token_id is not None
    summary = collector.summary(() if has_eos else ("the tokenizer has no EOS token, so documents end without one",))
    if not summary.num_examples:
        raise IsthmusError(f"data: {source} {_why_empty(summary, seq_len, collector.least_seq_len)}")
    return TokenDataset(
        token_ids=np.frombuffer(collector.token_ids, np.int32),
        is_label=np.frombuffer(collector.is_label, bool),
        offsets=np.frombuffer(collector.offsets, np.int64),
        seq_len=seq_len,
        pad_token_id=pad_token_id(tokenizer),
        is_encoder_decoder=is_encoder_decoder,
        summary=summary,
    )


def _why_empty(summary: LoadSummary, seq_len: int, least_seq_len: int | None) -> str:
    if least_seq_len is not None:
        return (
            f"has no example that fits seq_len {seq_len}: of all {summary.num_too_long}, the shortest needs "
            f"{least_seq_len} tokens; give --seq-len {least_seq_len} or more"
        )
    if summary.num_records:
        return (
            f"has nothing to predict: all {summary.num_records} records are an empty text, an empty completion or a "
            "conversation without an assistant turn"
        )
    return "is empty, wanted at least one record"


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Batches of ``records``, bounded in number and in characters, so that neither many nor long ones pile up."""
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += sum(len(value) for value in record.fields.values() if isinstance(value, str))
        if len(batch) == BATCH_RECORDS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
