"""How micro-batches are divided where not all fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.flights import check_in_flight, flight_sizes, largest_flight, smallest_flight

NUMBERS = st.integers(1, 40)


@given(number=NUMBERS, most=NUMBERS)
def test_flights_are_as_few_as_can_be_and_as_equal(number: int, most: int) -> None:
    sizes = flight_sizes(number, most)
    assert sum(sizes) == number and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert (len(sizes) - 1) * most < number


@given(number=NUMBERS, fitting=NUMBERS)
def test_the_fewest_flights_that_fit_are_taken(number: int, fitting: int) -> None:
    size = largest_flight(number, lambda size: size <= fitting)
    assert size == max(flight_sizes(number, fitting))
    assert (size == number) == (fitting >= number)


@given(number=NUMBERS, asked=NUMBERS, fitting=st.integers(0, 40))
def test_what_was_asked_for_is_taken_or_nothing(number: int, asked: int, fitting: int) -> None:
    wanted = smallest_flight(number, asked)
    assert wanted <= asked
    assert largest_flight(number, lambda size: size <= fitting, asked) == (wanted if wanted <= fitting else None)
    assert smallest_flight(number) == 1


@pytest.mark.parametrize("asked", [0, -1, 5, 2.0, "2", True])
def test_numbers_that_no_step_can_have_are_refused(asked: object) -> None:
    with pytest.raises(
        ValueError, match=r"micro_batches_in_flight: got .*, wanted a whole number from 1 to 4, the micro"
    ):
        check_in_flight(asked, 4)
    check_in_flight(4, 4)
    check_in_flight(None, 4)
