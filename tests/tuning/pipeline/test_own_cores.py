"""The cores of a host are divided among its processes: none is left idle while another has too many."""

from __future__ import annotations

from collections import Counter

import pytest

from isthmus.tuning.pipeline.company import own_cores


@pytest.mark.parametrize(("num_cores", "num_processes"), [(2, 1), (2, 2), (2, 3), (2, 4), (1, 4), (8, 3), (5, 7)])
def test_every_core_has_as_many_processes_as_another_or_one_more(num_cores: int, num_processes: int) -> None:
    cores = [10 + number for number in range(num_cores)]
    found = [own_cores(cores, place, num_processes) for place in range(num_processes)]
    assert all(found)
    of_core = Counter(core for own in found for core in own)
    assert set(of_core) == set(cores) and max(of_core.values()) - min(of_core.values()) <= 1


def test_processes_have_cores_of_their_own_where_there_are_enough() -> None:
    assert [own_cores([0, 1, 2, 3, 4], place, 2) for place in range(2)] == [[0, 1], [2, 3, 4]]
    # Four processes on two cores: two each, where three were on the first before.
    assert [own_cores([0, 1], place, 4) for place in range(4)] == [[0], [0], [1], [1]]
