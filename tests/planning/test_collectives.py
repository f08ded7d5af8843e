"""The cost of exchanges against what each algorithm sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.collectives import CollectiveCosts

costs = st.builds(
    CollectiveCosts,
    world_size=st.integers(1, 8),
    latency_s=st.floats(0, 0.1),
    bytes_per_s=st.floats(1e4, 1e10),
    message_s=st.floats(0, 1e-3),
)


@pytest.mark.parametrize(
    ("algorithm", "hops", "messages", "sent_bytes"),
    [("mesh", 1, 3, 3000), ("two_step", 2, 6, 1500), ("ring", 6, 6, 1500)],
)
def test_an_all_reduce_costs_its_hops_messages_and_bytes(algorithm, hops: int, messages: int, sent_bytes: int) -> None:
    network = CollectiveCosts(world_size=4, latency_s=1.0, bytes_per_s=1.0, message_s=100.0)
    assert network.all_reduce_s(1000, algorithm) == hops + 200 * messages + sent_bytes


def test_small_messages_go_to_all_at_once_and_large_ones_in_two_steps() -> None:
    network = CollectiveCosts(world_size=4, latency_s=100e-6, bytes_per_s=125e6)
    # Two steps save half of the bytes and cost one more latency: even at 1.5 · bytes ÷ rate = latency.
    assert network.best_all_reduce(8_000) == "mesh"
    assert network.best_all_reduce(9_000) == "two_step"


@given(network=costs, num_bytes=st.integers(0, 10**8))
def test_the_best_is_no_slower_than_any(network, num_bytes: int) -> None:
    best_s = network.all_reduce_s(num_bytes, network.best_all_reduce(num_bytes))
    for algorithm in ("mesh", "two_step", "ring"):
        assert best_s <= network.all_reduce_s(num_bytes, algorithm) * (1 + 1e-9)
    assert network.all_gather_s(num_bytes) <= network.all_gather_s(num_bytes, "ring") * (1 + 1e-9)


def test_one_device_exchanges_nothing() -> None:
    network = CollectiveCosts(world_size=1, latency_s=1.0, bytes_per_s=1.0)
    assert network.all_reduce_s(10) == network.all_reduce_s(10, "ring") == network.all_gather_s(10) == 0.0
