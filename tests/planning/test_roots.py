"""Orders of accelerators: against every other order, where there are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.roots import order_by_roots


def alike(roots: Sequence[object], order: Sequence[int]) -> tuple[int, int]:
    """(neighbours under one root round the ring, the same without the closing pair)."""
    row = sum(roots[a] == roots[b] for a, b in pairwise(order))
    return row + (len(order) > 1 and roots[order[-1]] == roots[order[0]]), row


def best(roots: Sequence[object], numbers: Sequence[int]) -> list[int]:
    """The first of all orders with the fewest neighbours alike."""
    return list(min(permutations(numbers), key=lambda order: alike(roots, order)))


def parts(number: int, most: int) -> Iterator[list[int]]:
    """Ways of writing ``number`` as a falling sum."""
    if not number:
        yield []
    for first in range(min(number, most), 0, -1):
        for rest in parts(number - first, first):
            yield [first, *rest]


@given(roots=st.lists(st.integers(0, 6), max_size=6))
def test_the_order_is_the_first_of_the_best(roots: list[int]) -> None:
    assert order_by_roots(roots) == best(roots, range(len(roots)))


@pytest.mark.parametrize("sizes", [sizes for number in range(1, 9) for sizes in parts(number, number)])
def test_no_order_of_up_to_eight_has_fewer_neighbours_under_one_root(sizes: list[int]) -> None:
    """However many are under each root."""
    grouped = [root for root, size in enumerate(sizes) for _ in range(size)]
    fewest = min(alike(row, range(len(row))) for row in all_rows(grouped))
    shuffled = grouped.copy()
    Random(0).shuffle(shuffled)
    for roots in (grouped, grouped[::-1], shuffled):
        order = order_by_roots(roots)
        assert sorted(order) == list(range(len(roots)))
        assert alike(roots, order) == fewest


def all_rows(roots: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every row of these roots, each once."""
    counts = Counter(roots)

    def grown(row: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(row) == len(roots):
            yield row
        for root in counts:
            if row.count(root) < counts[root]:
                yield from grown((*row, root))

    return grown(())


@pytest.mark.parametrize("roots", [[7] * 8, list("abcdefgh"), [None] * 4, ["a", "a", None, "b"], [], ["a"]])
def test_where_nothing_is_better_the_numbers_order_stays(roots: list[object]) -> None:
    assert order_by_roots(roots) == list(range(len(roots)))  # type: ignore[arg-type]


def test_hosts_as_they_are_sold() -> None:
    assert order_by_roots([*"aabb"]) == [0, 2, 1, 3]
    assert order_by_roots([*"aaaabbbb"]) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order_by_roots([*"aabbccdd"]) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert order_by_roots([*"aab"]) == [0, 2, 1]  # the last and the first are alike: they meet once a round less


def test_some_are_taken_from_all_roots_evenly_and_then_those_with_low_numbers() -> None:
    assert order_by_roots([*"aaaabbbb"], 2) == [0, 4]
    assert order_by_roots([*"aaaabbbb"], 4) == [0, 4, 1, 5]
    assert order_by_roots([*"aaaaaaab"], 3) == [0, 7, 1]
    assert order_by_roots([*"abcd"], 2) == order_by_roots([*"aaaa"], 2) == [0, 1]
    assert order_by_roots([None, None, None], 2) == [0, 1]
    assert order_by_roots([*"ab"], 0) == []
    with pytest.raises(ValueError, match="num_wanted: got 3, wanted 0 to 2, the accelerators there are"):
        order_by_roots([*"ab"], 3)


@given(roots=st.lists(st.integers(0, 3), min_size=1, max_size=7), data=st.data())
def test_no_other_choice_of_some_has_fewer_neighbours_under_one_root(roots: list[int], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, min(len(roots), 5)))
    order = order_by_roots(roots, number)
    assert len(set(order)) == number
    others = [alike(roots, best(roots, some)) for some in combinations(range(len(roots)), number)]
    assert alike(roots, order) == min(others)
    taken = Counter(roots[one] for one in order)
    left = Counter(roots) - taken
    assert all(taken[root] + 1 >= max(taken.values()) for root in left)  # as evenly as can be


def test_a_thousand_take_no_time() -> None:
    order = order_by_roots([number // 8 for number in range(1024)])
    assert alike([one // 8 for one in range(1024)], order) == (0, 0)
