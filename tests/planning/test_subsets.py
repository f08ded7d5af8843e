"""Which sets of devices are weighed: all of few devices, and few of many, the best of which is near the best of all."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.planning.clusters import BERT, cluster, device, even_cluster, link

from isthmus.planning import residency, subsets
from isthmus.planning.device_costs import DeviceCosts
from isthmus.planning.inference import weigh
from isthmus.planning.plans import Question
from isthmus.planning.residency import plans_to_keep
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import InferencePlan, InferenceRequest

MIB = 1 << 20
REQUEST = InferenceRequest(num_tokens=128)


def question(measured: ClusterProfile, **options: object) -> Question:
    return Question(**{"spec": BERT, "request": REQUEST, "profile": measured, **options})  # pyright: ignore[reportArgumentType]


def sets_of(asked: Question) -> list[tuple[int, ...]]:
    costs = {
        rank: DeviceCosts(profile=each, link=asked.profile.links[rank], spec=asked.spec, dtype="fp32")
        for rank, each in enumerate(asked.profile.devices)
    }
    return list(subsets.subsets(asked, costs))


def uneven_cluster(num_devices: int, seed: int = 1) -> ClusterProfile:
    draw = random.Random(seed)
    devices = [device(BERT, 10 ** draw.uniform(9.3, 11)) for _ in range(num_devices)]
    return cluster(devices, [link(10 ** draw.uniform(6, 9)) for _ in range(num_devices)])


def test_of_few_devices_every_set_with_the_leader_is_weighed() -> None:
    found = sets_of(question(uneven_cluster(5)))
    others = itertools.chain.from_iterable(itertools.combinations(range(1, 5), size) for size in range(5))
    assert found == [(0, *chosen) for chosen in others]


@pytest.mark.parametrize("num_devices", [9, 32, 64])
def test_of_many_devices_sets_are_few_and_each_is_one(num_devices: int) -> None:
    found = sets_of(question(uneven_cluster(num_devices)))
    assert all(each[0] == 0 and list(each) == sorted(set(each)) for each in found)
    assert len(set(found)) == len(found) <= 80
    assert tuple(range(num_devices)) in found and (0,) in found


def test_devices_that_are_alike_make_one_set_of_each_size() -> None:
    assert [len(each) for each in sets_of(question(even_cluster(32, 1e8)))] == [
        *range(1, 9),
        *(10, 12, 14, 16, 20, 24, 28, 32),
    ]


@settings(max_examples=15)
@given(
    speeds=st.lists(st.floats(1e9, 1e11), min_size=2, max_size=5),
    rates=st.lists(st.floats(1e6, 1e9), min_size=5, max_size=5),
    free=st.lists(st.sampled_from([200 * MIB, 600 * MIB]), min_size=5, max_size=5),
    tokens=st.sampled_from([16, 128]),
)
@example(speeds=[1e9, 4e10, 4e9], rates=[1e6] * 5, free=[200 * MIB, 600 * MIB, 600 * MIB, 0, 0], tokens=16)
def test_the_best_of_the_sensible_sets_is_near_the_best_of_all(
    speeds: list[float], rates: list[float], free: list[int], tokens: int
) -> None:
    devices = [device(BERT, speed, free_memory_bytes=room) for speed, room in zip(speeds, free, strict=False)]
    links = [link(rate) for rate in rates[: len(devices)]]
    asked = question(cluster(devices, links), request=InferenceRequest(num_tokens=tokens))
    best_s = []
    for all_up_to in (8, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subsets, "ALL_UP_TO", all_up_to)
            best_s.append(min((each.latency_s for each in weigh(asked) if each.fits), default=0.0))
    assert best_s[1] <= 1.05 * best_s[0]


def test_plans_of_thirty_two_devices_are_a_few_hundred() -> None:
    assert sum(1 for _ in weigh(question(uneven_cluster(32)))) < 600


def test_few_plans_of_many_devices_are_looked_at_when_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of each situation among them."""
    monkeypatch.setattr(subsets, "ALL_UP_TO", 2)
    monkeypatch.setattr(residency, "_EXACT_UP_TO", 2)
    monkeypatch.setattr(residency, "SLOWDOWNS", (1.0, 16.0))
    monkeypatch.setattr(residency, "_MOST_OF_MANY", 3)
    pools: list[int] = []
    offers = residency._offers

    def counted(pool: list[InferencePlan], weighed: list) -> Any:
        pools.append(len(pool))
        return offers(pool, weighed)

    monkeypatch.setattr(residency, "_offers", counted)
    asked = question(uneven_cluster(4), strategies=("single", "tensor", "sequence"))
    kept = plans_to_keep(asked)
    num_situations = len(residency.requests(asked)) * len(residency.SLOWDOWNS)
    assert pools[0] <= 1 + num_situations * residency._MOST_OF_MANY
    assert kept.loss < 1.05
