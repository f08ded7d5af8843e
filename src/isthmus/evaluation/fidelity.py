"""How like one model's embeddings are to another's: text by text, and in how texts lie to each other.

Shapes: N texts, H hidden units, P = N·(N - 1)/2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_TEXTS = 4096
"""Pairs of more would not fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """``cosine``: mean over texts of the cosine of both models' vectors. ``spearman``: rank correlation of all pairs'
    cosines in one model with those in the other, 1 where both order every pair alike."""

    cosine: float
    spearman: float


def fidelity(original_NH: np.ndarray, other_NH: np.ndarray) -> Fidelity:
    """Compares two models' vectors of the same texts. Raises ``ValueError`` for fewer than three texts or too many."""
    if original_NH.shape[0] != other_NH.shape[0] or not 3 <= len(original_NH) <= MAX_TEXTS:
        raise ValueError(
            f"texts: got {len(original_NH)} and {len(other_NH)} vectors, wanted as many of both, 3 to {MAX_TEXTS}"
        )
    original, other = _normalised(original_NH), _normalised(other_NH)
    cosine = float((original * other).sum(axis=1).mean()) if original.shape == other.shape else float("nan")
    return Fidelity(cosine=cosine, spearman=spearman(_pairs(original), _pairs(other)))


def spearman(left_P: np.ndarray, right_P: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where one side is constant."""
    left, right = (values - values.mean() for values in (_ranks(left_P), _ranks(right_P)))
    scale = float(np.sqrt((left * left).sum() * (right * right).sum()))
    return float((left * right).sum() / scale) if scale > 0 else 0.0


def _normalised(vectors_NH: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors_NH, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _pairs(vectors_NH: np.ndarray) -> np.ndarray:
    return (vectors_NH @ vectors_NH.T)[np.triu_indices(len(vectors_NH), 1)]


def _ranks(values_P: np.ndarray) -> np.ndarray:
    order = np.argsort(values_P, kind="stable")
    ordered = values_P[order]
    # The first place of each run of equal values, and the place after its last.
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(ordered)]
    ranks = np.empty(len(values_P))
    ranks[order] = np.repeat((starts + ends - 1) / 2, ends - starts)
    return ranks
