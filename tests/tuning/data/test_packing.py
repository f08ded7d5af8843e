"""Packing places every example once, never overfills, and fills well."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.tuning.data import packing
from isthmus.tuning.data.packing import pack

LENGTHS = st.lists(st.integers(1, 32), max_size=80)


@given(LENGTHS, st.integers(0, 3))
def test_every_example_is_in_exactly_one_group_and_no_group_overflows(lengths: list[int], seed: int) -> None:
    groups = pack(np.asarray(lengths, np.int64), 32, np.random.default_rng(seed))
    assert sorted(example for group in groups for example in group.tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in group) <= 32 for group in groups)


@given(LENGTHS)
def test_no_two_groups_of_a_window_would_fit_into_one(lengths: list[int]) -> None:
    groups = pack(np.asarray(lengths, np.int64), 32, np.random.default_rng(0))
    fills = sorted(sum(lengths[example] for example in group) for group in groups)
    assert len(fills) < 2 or fills[0] + fills[1] > 32


def test_long_examples_are_placed_before_the_short_ones_that_fill_up() -> None:
    groups = pack(np.asarray([10, 22] * 6), 32, np.random.default_rng(0))
    assert len(groups) == 6


def test_the_same_seed_gives_the_same_groups_and_another_gives_others() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    first, again, other = (pack(lengths, 128, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert [group.tolist() for group in first] == [group.tolist() for group in again]
    assert [group.tolist() for group in first] != [group.tolist() for group in other]


def test_windows_bound_what_is_packed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_EXAMPLES", 2)
    groups = pack(np.ones(10, np.int64), 32, np.random.default_rng(0))
    assert [len(group) for group in groups] == [2] * 5
