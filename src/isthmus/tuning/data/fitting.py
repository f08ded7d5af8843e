"""Making examples fit ``seq_len``: documents are split into pieces, completions lose the left of their prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from isthmus.tuning.data.encoding import Example, Frame


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """Fits examples for one model. With an encoder, ``seq_len`` bounds source and target, each on its own."""

    seq_len: int
    is_encoder_decoder: bool
    source_frame: Frame
    target_frame: Frame

    def fit(self, example: Example) -> list[Example]:
        """What is trained on of ``example``: nothing, if what is to be predicted does not fit with a token before it.

        Decoders: a document is split into pieces of ``seq_len`` tokens (only the last is shorter), each seen on its
        own; of anything else the last ``seq_len`` tokens are kept, less those before the first token of a prompt among
        them, and always what the tokenizer puts before a text (BOS). Encoder–decoder models: the source keeps its last
        tokens; of each piece of a document the first half is the source and the second half the target.
        """
        if self.is_encoder_decoder:
            return self._fit_pair(example) if not example.is_document else self._fit_halves(example)
        if len(example.token_ids) <= self.seq_len:
            return [example]
        if example.is_document:
            bounds = _piece_bounds(len(example.token_ids), self.seq_len)
            return [_slice(example, start, end) for start, end in bounds]
        return self._truncate(example)

    def num_whole_tokens(self, example: Example) -> int:
        """The tokens of ``example`` if nothing of it had to go."""
        is_framed_later = self.is_encoder_decoder and not example.is_document
        return len(example.token_ids) + is_framed_later * (len(self.source_frame) + len(self.target_frame))

    def num_tokens_needed(self, example: Example) -> int:
        """The least ``seq_len`` for which ``fit`` keeps something of ``example``."""
        if self.is_encoder_decoder:
            return int(example.is_label.sum()) + len(self.target_frame)
        num_lead = self._num_lead(example)
        rest = example.is_label[num_lead:]
        completions = np.flatnonzero(~rest[:-1] & rest[1:])
        # Without a prompt it stays whole or not at all.
        return len(example.token_ids) if not len(completions) else num_lead + len(rest) - int(completions[-1])

    def _truncate(self, example: Example) -> list[Example]:
        num_lead = self._num_lead(example)
        first = len(example.token_ids) - (self.seq_len - num_lead)
        prompt = np.flatnonzero(~example.is_label[first:])
        if not len(prompt) or not example.is_label[first + prompt[0] :].any():
            return []
        rest = slice(first + int(prompt[0]), None)
        return [
            replace(
                example,
                token_ids=np.concatenate([example.token_ids[:num_lead], example.token_ids[rest]]),
                is_label=np.concatenate([example.is_label[:num_lead], example.is_label[rest]]),
            )
        ]

    def _num_lead(self, example: Example) -> int:
        lead = self.source_frame.lead
        return len(lead) if tuple(example.token_ids[: len(lead)].tolist()) == lead else 0

    def _fit_pair(self, example: Example) -> list[Example]:
        source, target = example.token_ids[~example.is_label], example.token_ids[example.is_label]
        if not len(target) or len(target) + len(self.target_frame) > self.seq_len:
            return []
        return [self._framed(source[max(0, len(source) + len(self.source_frame) - self.seq_len) :], target)]

    def _fit_halves(self, example: Example) -> list[Example]:
        room = self.seq_len - max(len(self.source_frame), len(self.target_frame))
        pieces = []
        for start, end in _piece_bounds(len(example.token_ids), 2 * room):
            middle = (start + end) // 2
            pieces.append(self._framed(example.token_ids[start:middle], example.token_ids[middle:end]))
        return pieces

    def _framed(self, source: np.ndarray, target: np.ndarray) -> Example:
        framed = [
            np.concatenate([np.asarray(frame.lead, np.int32), part, np.asarray(frame.trail, np.int32)])
            for part, frame in ((source, self.source_frame), (target, self.target_frame))
        ]
        token_ids = np.concatenate(framed)
        return Example(token_ids, np.arange(len(token_ids)) >= len(framed[0]), is_document=False)


def _slice(example: Example, start: int, end: int) -> Example:
    return replace(example, token_ids=example.token_ids[start:end], is_label=example.is_label[start:end])


def _piece_bounds(num_tokens: int, piece_tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive pieces of ``piece_tokens``, the last one shorter, but never a lone token that nothing predicts."""
    bounds = [*range(0, num_tokens, piece_tokens), num_tokens]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        bounds[-2] -= 1
    return itertools.pairwise(bounds)
