"""Scores of classification, as the tasks are published: accuracy, F1 and Matthews' correlation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def accuracy(predicted_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """Share that is right."""
    return float((predicted_N == wanted_N).mean())


def f1(predicted_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where nothing of it was found."""
    hits = float(((predicted_N == 1) & (wanted_N == 1)).sum())
    return 2 * hits / max(1.0, float((predicted_N == 1).sum() + (wanted_N == 1).sum()))


def matthews(predicted_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """Matthews' correlation of two classes, -1 … 1; 0 where all are given one class."""
    table = np.histogram2d(predicted_N, wanted_N, bins=[[-0.5, 0.5, 1.5]] * 2)[0]
    (tn, fn), (fp, tp) = table
    scale = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return float((tp * tn - fp * fn) / scale) if scale > 0 else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
