"""What processes of one run agree on, and how those of one host share it. The others' part is played."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.engine import StepCounts
from isthmus.tuning.pipeline import company
from isthmus.tuning.pipeline.company import StepFacts, require_same, require_shared, share_cores
from isthmus.tuning.pipeline.links import Links


class Played(Links):
    """One of several ranks that tell ``told``; what this one tells is kept."""

    def __init__(self, rank: int, told: list[Any]) -> None:
        self.rank, self.size, self.told, self.fact = rank, len(told), told, None
        self.first: object = None

    def gather(self, fact: object, what: str) -> list[Any]:
        self.fact = fact
        return self.told

    def from_first(self, fact: object, what: str) -> Any:
        return self.first if self.rank else fact


def shares(
    monkeypatch: pytest.MonkeyPatch, cores: list[set[int]], hosts: list[str] | None = None
) -> list[tuple[set[int], int]]:
    """(cores, number to compute on) of every rank, given the cores that each has at first."""
    found = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for rank, mine in enumerate(cores):
        pinned = [mine]
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, mine=mine: mine)
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted, pinned=pinned: pinned.append(set(wanted)))
        monkeypatch.setattr(company, "num_cpus_usable", lambda mine=mine: len(mine))
        names = hosts or [socket.gethostname()] * len(cores)
        if hosts:
            monkeypatch.setattr(socket, "gethostname", lambda name=hosts[rank]: name)
        told = [[name, sorted(has)] for name, has in zip(names, cores, strict=True)]
        number = share_cores(Played(rank, told))
        found.append((pinned[-1], number))
    return found


def test_every_core_of_a_host_is_one_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shares(monkeypatch, [set(range(8))] * 3)
    assert sorted(core for cores, _ in found for core in cores) == list(range(8))
    assert [number for _, number in found] == [2, 2, 2]


def test_more_processes_than_cores_share_them_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_processes, num_cores in ((4, 2), (5, 2), (8, 3), (3, 2)):
        found = shares(monkeypatch, [set(range(num_cores))] * num_processes)
        assert all(len(cores) == number == 1 for cores, number in found)
        load = Counter(core for cores, _ in found for core in cores)
        assert len(load) == num_cores
        assert max(load.values()) - min(load.values()) <= 1


def test_cores_that_a_user_has_divided_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(monkeypatch, [{0, 1, 2}, {3}]) == [({0, 1, 2}, 3), ({3}, 1)]


def test_only_processes_of_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shares(monkeypatch, [set(range(4))] * 3, hosts=["a", "b", "a"])
    assert [cores for cores, _ in found] == [{0, 1}, {0, 1, 2, 3}, {2, 3}]


def test_threads_that_a_user_asked_for_are_not_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(company, "num_cpus_usable", lambda: 8)
    links = Played(0, [[socket.gethostname(), list(range(8))]] * 2)
    for asked, wanted in (("1", 4), ("2", 2), ("16", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert share_cores(links) == wanted


def test_the_first_difference_is_named() -> None:
    same = {"seed": 0, "dtype": "bf16"}
    require_same(Played(0, [same, same]), same)
    with pytest.raises(IsthmusError, match="dtype: rank 2 got 'fp32', rank 0 'bf16'; wanted the same everywhere"):
        require_same(Played(1, [same, same, same | {"dtype": "fp32"}]), same)


def test_a_directory_that_one_does_not_see_is_refused_by_all_and_nothing_is_left(tmp_path: Path) -> None:
    require_shared(tmp_path, Played(0, [["a", True], ["b", True]]))
    for rank in range(2):
        played = Played(rank, [["a", True], ["b", False]])
        played.first = str(tmp_path / "seen")
        with pytest.raises(
            IsthmusError, match=f"output: rank 1, on b, does not see what rank 0, on a, .* {tmp_path}; "
        ):
            require_shared(tmp_path, played)
        assert played.fact == [socket.gethostname(), rank == 0]
    assert not list(tmp_path.iterdir())


def test_a_steps_facts_are_those_of_all_ranks() -> None:
    def facts(layer: int, bound_s: float) -> StepFacts:
        counts = StepCounts({layer: [3, 1]}, num_on_cpu=2, num_on_accelerator=4, cpu_tokens=5, tokens=8)
        return StepFacts(counts=counts, h2d_bytes=10, d2h_bytes=20, bound_s=bound_s)

    told = []
    for layer, bound_s in ((0, 1.0), (5, 2.0)):
        listening = Played(0, [{"counts": [], "sums": [0] * 6, "bound": 0.0}])
        facts(layer, bound_s).of_all(listening)
        told.append(listening.fact)
    whole = facts(0, 1.0).of_all(Played(0, told))
    assert whole.counts == StepCounts({0: [3, 1], 5: [3, 1]}, 4, 8, 10, 16)
    assert (whole.h2d_bytes, whole.d2h_bytes, whole.bound_s) == (20, 40, 2.0)
