"""Passages cut into windows that a model can read, and spans of their tokens turned back into answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from isthmus.evaluation.encoding import Encoded
from isthmus.evaluation.questions import Question

STRIDE_SHARE = 1 / 3
MAX_ANSWER_TOKENS = 30
_NUM_CANDIDATES = 20


@dataclass(frozen=True)
class Window:
    """Part of a question's passage with the question before it. ``start`` and ``end`` are the answer's first and last
    token, 0 where it is not in this window; ``offsets`` are each token's place in the passage, (-1, -1) outside it."""

    question: int
    encoded: Encoded
    start: int
    end: int
    offsets: np.ndarray


def windows(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_length: int) -> list[Window]:
    """Windows of all questions, overlapping by a third. Needs a fast tokenizer."""
    columns: Any = tokenizer(
        [question.question for question in questions],
        [question.passage for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=round(max_length * STRIDE_SHARE),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = [name for name in columns if name not in ("overflow_to_sample_mapping", "offset_mapping")]
    found = []
    for row, number in enumerate(columns["overflow_to_sample_mapping"]):
        in_passage = np.array([kind == 1 for kind in columns.sequence_ids(row)])
        offsets = np.array(columns["offset_mapping"][row])
        offsets[~in_passage] = -1
        encoded = {name: np.asarray(columns[name][row], np.int64) for name in names}
        found.append(Window(number, encoded, *_span(questions[number], offsets), offsets))
    return found


def _span(question: Question, offsets: np.ndarray) -> tuple[int, int]:
    first, last = question.start, question.start + len(question.answers[0])
    covers = (offsets[:, 0] < last) & (offsets[:, 1] > first) & (offsets[:, 0] >= 0)
    tokens = np.flatnonzero(covers)
    if not len(tokens) or offsets[tokens[0], 0] > first or offsets[tokens[-1], 1] < last:
        return 0, 0
    return int(tokens[0]), int(tokens[-1])


def best_answers(
    questions: Sequence[Question], tests: Sequence[Window], starts: Sequence[np.ndarray], ends: Sequence[np.ndarray]
) -> list[str]:
    """Each question's span with the highest sum of logits, over all its windows; empty where no span is possible."""
    best = [(-np.inf, "")] * len(questions)
    for window, start_logits, end_logits in zip(tests, starts, ends, strict=True):
        length = len(window.offsets)
        inside = window.offsets[:, 0] >= 0
        start, end = (np.where(inside, logits[:length], -np.inf) for logits in (start_logits, end_logits))
        for first in np.argsort(-start)[:_NUM_CANDIDATES]:
            lasts = np.arange(first, min(first + MAX_ANSWER_TOKENS, length))
            last = lasts[np.argmax(end[lasts])]
            score = start[first] + end[last]
            if np.isfinite(score) and score > best[window.question][0]:
                passage = questions[window.question].passage
                text = passage[window.offsets[first, 0] : window.offsets[last, 1]]
                best[window.question] = (float(score), text)
    return [text for _, text in best]
