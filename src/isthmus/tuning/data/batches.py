"""Micro-batches: packed (or, with an encoder, padded) examples as tensors, epoch after epoch, resumable to the token.

Legend: ``B`` sequences of a micro-batch, ``S`` tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data.dataset import TokenDataset
from isthmus.tuning.data.packing import pack

IGNORED = -100
"""The label of a token that is not to be predicted, as transformers' losses have it."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Arguments of a model's forward (``use_cache=False`` must be added), on the CPU, int64.

    Decoders: ``input_ids``, ``position_ids``, ``labels``, each (B, S) with S = ``seq_len``. Position ids start again at
    each document, from which transformers builds a mask that keeps documents apart — as long as neither an
    attention mask nor a cache is passed. Labels are not shifted (the model does); the first token of a document has
    none. The rest of a sequence is padding: a document of its own without labels.

    With an encoder: ``input_ids`` and ``attention_mask`` (B, longest source), ``labels`` (B, longest target).
    """

    inputs: dict[str, torch.Tensor]
    num_tokens: int
    """Without padding; sources and targets both count."""
    num_label_tokens: int
    """Tokens that the loss is the mean of (after the model's shift)."""

    @property
    def num_computed_tokens(self) -> int:
        """With padding, which layers compute like all else."""
        names = ("input_ids", "labels") if "attention_mask" in self.inputs else ("input_ids",)
        return sum(self.inputs[name].numel() for name in names)


def largest_micro_batch(num_sequences: int, seq_len: int, target_len: int | None = None) -> MicroBatch:
    """What takes most memory of all micro-batches with sequences of at most ``seq_len`` tokens: two documents in each,
    for which attention needs a mask. With an encoder (``target_len``): sources and targets of full length. Tokens are
    zeros."""
    ids_BS = torch.zeros((num_sequences, seq_len), dtype=torch.int64)
    labels_BS = torch.zeros((num_sequences, target_len or seq_len), dtype=torch.int64)
    labels_BS[:, 0] = IGNORED
    inputs = {"input_ids": ids_BS, "labels": labels_BS}
    if target_len is not None:
        inputs["attention_mask"] = torch.ones_like(ids_BS)
    else:
        half = seq_len // 2
        positions_S = torch.cat([torch.arange(half), torch.arange(seq_len - half)])
        inputs["position_ids"] = positions_S.expand(num_sequences, seq_len)
    num_tokens = ids_BS.numel() + (labels_BS.numel() if target_len is not None else 0)
    return MicroBatch(inputs, num_tokens, int((labels_BS != IGNORED).sum()))


class BatchStream:
    """Endless steps of ``num_micro_batches`` micro-batches of ``micro_batch_size`` sequences over a data set.

    Each epoch packs anew, from (``seed``, epoch): every example is in exactly one sequence of an epoch. A step may
    take the last sequences of one epoch and the first of the next, so nothing is left out.
    """

    def __init__(
        self, dataset: TokenDataset, *, micro_batch_size: int = 1, num_micro_batches: int = 1, seed: int = 0
    ) -> None:
        for field, value in (("micro_batch_size", micro_batch_size), ("num_micro_batches", num_micro_batches)):
            if value < 1:
                raise IsthmusError(f"{field}: got {value}, wanted 1 or more")
        if seed < 0:
            raise IsthmusError(f"seed: got {seed}, wanted 0 or more")
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = num_micro_batches
        self._seed = seed
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Epochs begun before the one that the latest step ended in."""
        return self._epoch

    @property
    def num_sequences(self) -> int:
        """Sequences of this epoch; other epochs may have a few more or less."""
        return len(self._groups)

    @property
    def fill_ratio(self) -> float:
        """Share of this epoch's tokens that is not padding (1 with an encoder, where padding depends on the batch)."""
        if self._dataset.is_encoder_decoder:
            return 1.0
        return len(self._dataset.token_ids) / (len(self._groups) * self._dataset.seq_len)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step. Advances the stream."""
        return [
            self._collate([self._next_group() for _ in range(self._micro_batch_size)])
            for _ in range(self._num_micro_batches)
        ]

    def peek(self) -> list[MicroBatch]:
        """What ``next_step`` will give. Leaves the stream where it is."""
        state = self.state_dict()
        batches = self.next_step()
        self.load_state_dict(state)
        return batches

    def largest(self) -> MicroBatch:
        """Of the shapes that no micro-batch of this stream exceeds, whatever the order: to see what memory it takes."""
        dataset = self._dataset
        if not dataset.is_encoder_decoder:
            return largest_micro_batch(self._micro_batch_size, dataset.seq_len)
        targets = np.add.reduceat(dataset.is_label, dataset.offsets[:-1], dtype=np.int64)
        sources = dataset.lengths - targets
        return largest_micro_batch(self._micro_batch_size, int(sources.max()), int(targets.max()))

    def evaluation_batches(self, max_steps: int | None = None) -> list[list[MicroBatch]]:
        """The whole data set once in steps, or the first ``max_steps`` of them; the same at each call.

        In a random order, so that the first are a fair sample. The last step may have fewer micro-batches, and the last
        micro-batch fewer sequences. Leaves the stream where it is.
        """
        groups = self._groups_of(0)
        if max_steps is not None:
            groups = groups[: max_steps * self._num_micro_batches * self._micro_batch_size]
        batches = [
            self._collate(groups[start : start + self._micro_batch_size])
            for start in range(0, len(groups), self._micro_batch_size)
        ]
        starts = range(0, len(batches), self._num_micro_batches)
        return [batches[start : start + self._num_micro_batches] for start in starts]

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on with the very next step; plain JSON."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "dataset": self._dataset.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken; batch sizes may differ, sequences are taken up at the same place.

        Raises ``IsthmusError`` if the state is of another data set or seed.
        """
        for field, wanted, fix in (
            ("dataset", self._dataset.fingerprint, "resume with the same data, tokenizer, --columns and --seq-len"),
            ("seed", self._seed, "resume with the same --seed"),
        ):
            if state[field] != wanted:
                raise IsthmusError(f"resume: the checkpoint's {field} is {state[field]}, this run's is {wanted}; {fix}")
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._groups = self._groups_of(epoch)

    def _groups_of(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed, epoch])
        if self._dataset.is_encoder_decoder:
            return list(rng.permutation(len(self._dataset))[:, None])
        return pack(self._dataset.lengths, self._dataset.seq_len, rng)

    def _next_group(self) -> np.ndarray:
        if self._position == len(self._groups):
            self._start_epoch(self._epoch + 1)
        self._position += 1
        return self._groups[self._position - 1]

    def _collate(self, groups: list[np.ndarray]) -> MicroBatch:
        if self._dataset.is_encoder_decoder:
            return _collate_padded(self._dataset, [int(group[0]) for group in groups])
        return _collate_packed(self._dataset, groups)


def _collate_packed(dataset: TokenDataset, groups: list[np.ndarray]) -> MicroBatch:
    shape = (len(groups), dataset.seq_len)
    input_ids_BS = np.full(shape, dataset.pad_token_id, np.int64)
    position_ids_BS = np.empty(shape, np.int64)
    labels_BS = np.full(shape, IGNORED, np.int64)
    num_tokens = 0
    for row, group in enumerate(groups):
        start = 0
        for number in group:
            token_ids, is_label = dataset.example(number)
            end = start + len(token_ids)
            input_ids_BS[row, start:end] = token_ids
            position_ids_BS[row, start:end] = np.arange(len(token_ids))
            labels_BS[row, start:end] = np.where(is_label, token_ids, IGNORED)
            # The model shifts labels by one, across documents: a document's first would be asked of the one before it.
            labels_BS[row, start] = IGNORED
            start = end
        position_ids_BS[row, start:] = np.arange(dataset.seq_len - start)
        num_tokens += start
    inputs = {"input_ids": input_ids_BS, "position_ids": position_ids_BS, "labels": labels_BS}
    return _micro_batch(inputs, num_tokens)


def _collate_padded(dataset: TokenDataset, numbers: list[int]) -> MicroBatch:
    sources, targets = [], []
    for number in numbers:
        token_ids, is_label = dataset.example(number)
        sources.append(token_ids[~is_label])
        targets.append(token_ids[is_label])
    inputs = {
        "input_ids": _padded(sources, dataset.pad_token_id),
        "attention_mask": _padded([np.ones(len(source)) for source in sources], 0),
        "labels": _padded(targets, IGNORED),
    }
    return _micro_batch(inputs, sum(map(len, sources)) + sum(map(len, targets)))


def _padded(rows: list[np.ndarray], value: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _micro_batch(inputs: dict[str, np.ndarray], num_tokens: int) -> MicroBatch:
    num_label_tokens = int((inputs["labels"] != IGNORED).sum())
    return MicroBatch({name: torch.from_numpy(value) for name, value in inputs.items()}, num_tokens, num_label_tokens)
