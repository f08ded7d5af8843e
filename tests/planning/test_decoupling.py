"""What decoupling gains, against the paper's arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
from tests.planning.clusters import BERT

from isthmus.planning.decoupling import forms, gain_of

HERE = {"tokens": 128, "operations_per_s": 24e9, "bandwidths_bytes_per_s": (1e15, 125e6 / 8)}


def test_without_communication_the_gain_is_the_papers_cap() -> None:
    spec = dataclasses.replace(BERT, head_size=0)  # no scores
    gain = gain_of(spec, 4, (2, 5, 8, 11), **HERE)
    every = 3
    assert 1 / gain.time_ratios[0] == pytest.approx(1 / ((1 - 1 / every) / 4 + 1 / every))
    assert gain.operations_ratio == 1


def test_exchanges_and_bytes_are_those_of_the_gathers() -> None:
    gain = gain_of(BERT, 4, (2, 5, 8, 11), **HERE)
    one_gather = 128 * 768 * 4 * 3 // 4
    assert (gain.num_exchanges, gain.sent_bytes) == (4, 4 * one_gather)
    assert gain.tensor_parallel_sent_bytes == 12 * 2 * 2 * one_gather
    assert gain_of(BERT, 4, (0, 1, 2), **HERE).num_exchanges == 1  # at the end
    assert gain_of(BERT, 4, (5, 6, 11), **HERE).num_exchanges == 2


def test_operations_grow_by_the_scores_alone() -> None:
    short, long = (gain_of(BERT, 4, (11,), **{**HERE, "tokens": tokens}).operations_ratio for tokens in (16, 512))
    assert 1 < short < long
    layer = 2 * 128 * 12 * 768**2
    scores = 4 * 128**2 * 768
    wanted = (12 * (layer + scores) + 11 * 3 * scores) / (12 * (layer + scores))
    assert gain_of(BERT, 4, (11,), **HERE).operations_ratio == pytest.approx(wanted)


def test_slower_links_cost_more() -> None:
    fast, slow = gain_of(BERT, 4, (2, 5, 8, 11), **HERE).time_ratios
    assert fast < slow < 1


def test_forms_divide_the_hidden_size_and_leave_something_to_decouple() -> None:
    found = forms(6, 384)
    assert (4, (2, 5)) in found and (2, (5,)) in found
    assert all(originals[-1:] == (5,) and len(originals) < 6 for _, originals in found)
    assert all(num == 2 for num, _ in forms(2, 6))
