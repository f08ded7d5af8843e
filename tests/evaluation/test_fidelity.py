"""Fidelity against plain definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from isthmus.evaluation.fidelity import fidelity, spearman


def plain_ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


@pytest.mark.parametrize("num_values", [5, 5000])
def test_spearman_is_the_correlation_of_ranks(num_values: int) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, num_values // 3 + 2, (2, num_values)).astype(float)
    left, right = left[:500], right[:500]
    wanted = np.corrcoef(plain_ranks(left), plain_ranks(right))[0, 1]
    assert spearman(left, right) == pytest.approx(wanted, abs=1e-12)


def test_spearman_knows_only_order_and_a_constant_has_none() -> None:
    values = np.array([3.0, 1.0, 2.0, 7.0])
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(values, np.ones(4)) == 0


def test_fidelity_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    original = rng.normal(size=(12, 5))
    other = original + 0.5 * rng.normal(size=(12, 5))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    result = fidelity(original, other)
    assert result.cosine == pytest.approx(np.mean([cosine(a, b) for a, b in zip(original, other, strict=True)]))
    pairs = list(itertools.combinations(range(12), 2))
    ours, theirs = (np.array([cosine(rows[i], rows[j]) for i, j in pairs]) for rows in (other, original))
    assert result.spearman == pytest.approx(np.corrcoef(plain_ranks(ours), plain_ranks(theirs))[0, 1])
    same = fidelity(original, 3 * original)
    assert (same.cosine, same.spearman) == (pytest.approx(1), pytest.approx(1))


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="texts: got 2 and 2 vectors, wanted as many of both, 3 to"):
        fidelity(np.ones((2, 3)), np.ones((2, 3)))
