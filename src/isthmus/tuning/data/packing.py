"""Packing: which examples share a sequence of ``seq_len`` tokens. Pure arithmetic on lengths."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

WINDOW_EXAMPLES = 4096
"""Examples packed together. Larger windows fill no better; smaller ones keep the order of examples more random."""


def pack(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Groups of examples, each of at most ``seq_len`` tokens; every example is in exactly one. In random order.

    ``lengths`` (N,) are tokens, each at most ``seq_len``. Examples are shuffled, and each window of
    ``WINDOW_EXAMPLES`` is packed best-fit-decreasing: the longest first, each into the fullest sequence that still
    takes it (at most 11/9 of the fewest possible sequences, plus one, per window; Johnson 1974). O(N log N). The same
    state of ``rng`` gives the same groups.
    """
    order = rng.permutation(len(lengths))
    groups: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW_EXAMPLES):
        window = order[start : start + WINDOW_EXAMPLES]
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        groups.extend(_best_fit(longest_first, lengths, seq_len))
    return [groups[position] for position in rng.permutation(len(groups))]


def _best_fit(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[np.ndarray]:
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for example in order.tolist():
        length = int(lengths[example])
        position = bisect_left(room, (length, 0))
        if position < len(room):
            left, group = room.pop(position)
            groups[group].append(example)
        else:
            left, group = seq_len, len(groups)
            groups.append([example])
        insort(room, (left - length, group))
    return [np.asarray(group, np.int64) for group in groups]
