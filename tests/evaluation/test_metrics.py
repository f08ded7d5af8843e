"""Metrics against worked examples, and SQuAD's against the official script's behaviour."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.evaluation.metrics import accuracy, f1, matthews
from isthmus.evaluation.questions import exact_match, normalise, overlap

PREDICTED, WANTED = np.array([1, 1, 0, 0, 1, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0, 1, 1])


def test_metrics_are_their_definitions() -> None:
    # 3 true positives, 2 true negatives, 1 false positive, 2 false negatives
    assert accuracy(PREDICTED, WANTED) == 5 / 8
    assert f1(PREDICTED, WANTED) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert matthews(PREDICTED, WANTED) == pytest.approx((3 * 2 - 1 * 2) / np.sqrt(4 * 5 * 3 * 4))
    assert matthews(PREDICTED, WANTED) == pytest.approx(np.corrcoef(PREDICTED, WANTED)[0, 1])


def test_one_class_for_all_scores_nothing() -> None:
    zeros = np.zeros(8, int)
    assert (f1(zeros, WANTED), matthews(zeros, WANTED)) == (0, 0)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("The Eiffel Tower!", "eiffel tower"), (" a  b, an c", "b c"), ("the", ""), ("Theory", "theory")],
)
def test_answers_are_normalised_as_officially(answer: str, wanted: str) -> None:
    assert normalise(answer) == wanted


def test_answers_are_scored_against_the_best_truth() -> None:
    truths = ("Denver Broncos", "The Denver Broncos team")
    assert exact_match("the denver broncos.", truths) == 1
    assert exact_match("broncos", truths) == 0
    assert overlap("broncos", truths) == pytest.approx(2 * 1 / 3)
    assert overlap("seahawks", truths) == 0
