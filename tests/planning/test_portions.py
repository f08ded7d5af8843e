"""Exchanges in portions, while others are computed, in the planner: predicted, bounded, taken where they help."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.test_block_steps import decoupled, priced, profile

from isthmus.inference.runtime_planner import RuntimePlanner
from isthmus.planning.device_costs import DeviceCosts
from isthmus.planning.exchanges import HEADER_BYTES, all_gather
from isthmus.planning.inference import choose, costs_of, predict
from isthmus.planning.plans import Question
from isthmus.planning.step_seconds import Crew
from isthmus.planning.steps import Step, Work
from isthmus.planning.workload import workload
from isthmus.spec.cluster import ClusterProfile, Overlapping
from isthmus.spec.inference import ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json

SPEC = decoupled(6, (2, 5))
MBIT = 125e3
ONE_MORE_S = 2e-4 + 3 * 1e-4 + 1e-3
"""What an exchange of four devices takes at most, whatever its bytes, waiting included (``clusters``)."""
STARTING_S = 1e-4
ONE_MORE_PRODUCT_S = 5e-4
"""What a block takes, whatever its rows."""


def sending(plain: ClusterProfile, s_per_byte: float | None) -> ClusterProfile:
    found = None if s_per_byte is None else Overlapping(starting_s=STARTING_S, s_per_byte=s_per_byte)
    return replace(plain, links=tuple(replace(each, overlapping=found) for each in plain.links))


def question(mbit_per_s: float, s_per_byte: float | None, tokens: int = 128, num_devices: int = 4) -> Question:
    measured = profile(SPEC, (24e9,) * num_devices, mbit_per_s * MBIT)
    return Question(
        spec=SPEC,
        request=InferenceRequest(num_tokens=tokens),
        profile=sending(measured, s_per_byte),
        strategies=("block",),
    )


def twins(kinds: tuple[str, ...], num_devices: int = 4) -> tuple[InferencePlan, InferencePlan]:
    """One that does not overlap, and one that does."""
    plain = replace(InferencePlan.even("block", num_devices), originals=kinds)
    return plain, replace(plain, overlaps=True)


def test_of_computing_and_sending_at_once_the_longer_counts() -> None:
    asked = question(100, 1e-9)
    devices: list[DeviceCosts] = list(costs_of(asked, "fp32").values())
    [exchange] = all_gather("fp32", [25_000] * 4)
    few, many = (Work(mlp_rows=rows, mlp_share=1.0) for rows in (8, 128))
    idle = (Work(),) * 4

    crew = Crew(devices)

    def seconds(meanwhile: Work | None, of: Callable[[Step, list[float]], float] = crew.step_s) -> float:
        step = Step(work=idle, exchange=exchange, meanwhile=() if meanwhile is None else (meanwhile,) * 4)
        return of(step, [0.0] * 4)

    at_once_s = seconds(None)
    assert seconds(few) == pytest.approx(at_once_s + STARTING_S)
    sent = exchange[0].most_bytes
    transfer_s = devices[0].transfer_s(exchange[0])
    computed_s = devices[0].work_s(many) + sent * 1e-9
    assert transfer_s < computed_s
    assert seconds(many) == pytest.approx(at_once_s + STARTING_S - transfer_s + computed_s)
    least_s = {work: seconds(work, crew.least_step_s) for work in (None, few, many)}
    assert least_s[many] <= seconds(many) and least_s[few] == least_s[None]


@pytest.mark.parametrize("kinds", list(itertools.product(ORIGINAL_PLANS, repeat=2)), ids="-".join)
def test_only_headers_come_on_top_of_the_bytes(kinds: tuple[str, str]) -> None:
    plain, divided = (workload(plan, SPEC, InferenceRequest(num_tokens=128)) for plan in twins(kinds))
    num_more = divided.num_exchanges() - plain.num_exchanges()
    assert num_more == {"gather": 1, "tokens": 2, "sequence": 2, "tensor": 1, "fastest": 2}[kinds[0]] + (
        2 if kinds[1] == "fastest" else 1
    ) + (kinds[1] == "fastest")
    assert divided.sent_bytes() == tuple(sent + num_more * 3 * HEADER_BYTES for sent in plain.sent_bytes())


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(ORIGINAL_PLANS), st.sampled_from(ORIGINAL_PLANS)),
    mbit_per_s=st.sampled_from([5, 25, 125, 1000, 10_000]),
    tokens=st.sampled_from([1, 31, 32, 128, 500]),
    s_per_byte=st.sampled_from([0.0, 1e-9, 1e-8]),
)
def test_a_prediction_is_longer_by_no_more_than_what_comes_on_top(
    kinds: tuple[str, str], mbit_per_s: float, tokens: int, s_per_byte: float
) -> None:
    """One more exchange for each that is divided, two more products, and what sending takes of computing. And it is
    never below what is left when all that can overlap does."""
    asked = question(mbit_per_s, s_per_byte, tokens)
    plain, divided = (predict(asked, plan) for plan in twins(kinds))
    num_more = divided.num_exchanges - plain.num_exchanges
    assert (num_more > 0) == (tokens >= 32)
    steps = workload(divided.plan, SPEC, asked.request).steps
    most_bytes = (max(traffic.most_bytes for traffic in step.exchange) for step in steps if step.exchange is not None)
    on_top_s = num_more * (ONE_MORE_S + 2 * STARTING_S + 2 * ONE_MORE_PRODUCT_S) + sum(most_bytes) * s_per_byte
    assert divided.latency_s <= plain.latency_s + on_top_s + 1e-9
    assert divided.latency_s >= max(divided.bound_s, divided.compute_s) * 0.999
    assert divided.bound_s <= plain.bound_s + num_more * asked.profile.links[0].round_trip_s / 2 + 1e-9


@pytest.mark.parametrize(("mbit_per_s", "least"), [(125, 0.05), (50, 0.04), (25, 0.02)])
def test_slow_links_make_it_worth_it(mbit_per_s: float, least: float) -> None:
    chosen = choose(question(mbit_per_s, 2e-9)).chosen
    plain = choose(question(mbit_per_s, None)).chosen
    assert chosen.plan.overlaps and not plain.plan.overlaps
    assert chosen.latency_s < (1 - least) * plain.latency_s


@pytest.mark.parametrize(
    ("mbit_per_s", "s_per_byte", "tokens"),
    [(125, None, 128), (125, 1e-7, 128), (100_000, 2e-9, 128), (125, 2e-9, 31), (125, 2e-9, 1)],
)
def test_nothing_overlaps_where_it_does_not_help_or_was_not_measured(
    mbit_per_s: float, s_per_byte: float | None, tokens: int
) -> None:
    assert not choose(question(mbit_per_s, s_per_byte, tokens)).chosen.plan.overlaps


@settings(max_examples=20, deadline=None)
@given(
    mbit_per_s=st.sampled_from([5, 25, 125, 1000, 10_000]),
    tokens=st.sampled_from([16, 32, 128, 500]),
    s_per_byte=st.sampled_from([None, 1e-9, 2e-8]),
    num_devices=st.sampled_from([2, 3, 4]),
)
def test_no_other_ways_are_faster_with_or_without(
    mbit_per_s: float, tokens: int, s_per_byte: float | None, num_devices: int
) -> None:
    asked = question(mbit_per_s, s_per_byte, tokens, num_devices)
    chosen = choose(asked).chosen
    everything = itertools.product(ORIGINAL_PLANS, repeat=2)
    plans = [replace(chosen.plan, originals=kinds) for kinds in everything]
    if s_per_byte is not None:
        plans = [replace(plan, overlaps=overlaps) for plan in plans for overlaps in (False, True)]
    assert chosen.latency_s <= min(predict(asked, plan).latency_s for plan in plans) * (1 + 1e-9)


def test_codecs_leave_less_to_gain() -> None:
    gains = {}
    for codec in ("fp32", "int8"):
        seconds = []
        for s_per_byte in (None, 2e-9):
            asked = question(50, s_per_byte)
            seconds.append(choose(replace(asked, profile=priced(asked.profile), codecs=(codec,))).chosen.latency_s)
        gains[codec] = 1 - seconds[1] / seconds[0]
    assert gains["fp32"] > gains["int8"] >= 0


def test_the_runtime_planner_takes_the_one_of_two_that_is_predicted_to_be_faster() -> None:
    asked = question(125, 2e-8)
    planner = RuntimePlanner(asked, twins(("tokens", "tokens")))
    predicted = {}
    for tokens in (16, 128):
        request = replace(asked.request, num_tokens=tokens)
        seconds = [predict(replace(asked, request=request), plan).latency_s for plan in twins(("tokens", "tokens"))]
        predicted[tokens] = seconds.index(min(seconds))
        assert planner.choose(request) == predicted[tokens]
    assert predicted == {16: 0, 128: 1}


def test_plans_say_so_and_older_ones_do_not_overlap() -> None:
    plain, divided = twins(("tokens", "gather"))
    assert divided.way == "tokens+gather overlapped" and plain.way == "tokens+gather"
    assert from_json(InferencePlan, to_json(divided)) == divided
    old = json.loads(to_json(plain))
    del old["overlaps"]
    assert from_json(InferencePlan, json.dumps(old)) == plain
    with pytest.raises(ValueError, match="overlaps: got true for strategy 'tensor', wanted false; it is for block"):
        InferencePlan(strategy="tensor", devices=(0, 1), weights=(1.0, 1.0), overlaps=True)
