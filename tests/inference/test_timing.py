"""What ``time_plans`` notes of every plan: all requests, all tokens, and how far answers are from one device's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.inference.conftest import on_devices

from isthmus.inference.timing import Timed, time_plans
from isthmus.models.shards import ShardReader
from isthmus.planning.workload import workload
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.transport.base import Group

Checkpoint = Callable[[str], Path]
REPEATS = 3
PLANS = [
    InferencePlan.even("single", 1),
    InferencePlan.even("tensor", 2),
    InferencePlan.even("tensor", 3, codec="int8"),
]


def timed_by_device(
    directory: Path, request: InferenceRequest, plans: Sequence[InferencePlan] = PLANS
) -> list[list[Timed]]:
    def work(group: Group) -> list[Timed]:
        reader = ShardReader(directory)
        with ExitStack() as stack:
            return time_plans(stack, group, request, [(reader, plan) for plan in plans], REPEATS)

    return on_devices(3, work)


@pytest.mark.parametrize("num_new_tokens", [1, 2, 12])
def test_every_token_of_every_request_is_timed_and_lies_within_it(num_new_tokens: int, checkpoint: Checkpoint) -> None:
    request = InferenceRequest(num_tokens=5, num_new_tokens=num_new_tokens)
    leader, *others = timed_by_device(checkpoint("llama"), request)
    assert others == [[], []]
    for timed in leader:
        assert (len(timed.latencies_s), len(timed.first_token_s)) == (REPEATS, REPEATS)
        assert len(timed.token_s) == REPEATS * (num_new_tokens - 1)
        for number, latency_s in enumerate(timed.latencies_s):
            own_s = timed.token_s[number * (num_new_tokens - 1) : (number + 1) * (num_new_tokens - 1)]
            assert 0 < timed.first_token_s[number] + sum(own_s) < latency_s
            assert min(own_s, default=1) > 0


@pytest.mark.parametrize("num_new_tokens", [0, 4])
def test_errors_are_those_of_the_prompts_hidden_states(num_new_tokens: int, checkpoint: Checkpoint) -> None:
    [alone, exact, coarse], *_ = timed_by_device(
        checkpoint("llama"), InferenceRequest(num_tokens=5, num_new_tokens=num_new_tokens)
    )
    assert alone.max_rel_error == 0
    assert exact.max_rel_error is not None and exact.max_rel_error < 1e-5
    assert coarse.max_rel_error is not None and 1e-4 < coarse.max_rel_error < 0.1
    assert (alone.sent_bytes, alone.num_exchanges) == (0, 0)
    assert exact.num_exchanges and coarse.num_exchanges


def test_nothing_is_generated_where_it_was_not_asked_for(checkpoint: Checkpoint) -> None:
    leader, *_ = timed_by_device(checkpoint("bert"), InferenceRequest(num_tokens=5))
    for timed in leader:
        assert len(timed.latencies_s) == REPEATS and timed.first_token_s == timed.token_s == []


def test_bytes_are_those_of_the_device_that_sends_most(checkpoint: Checkpoint) -> None:
    plan = InferencePlan(strategy="sequence", devices=(0, 1, 2), weights=(1.0, 1.0, 4.0))
    request = InferenceRequest(num_tokens=12)
    [[timed], *_] = timed_by_device(checkpoint("bert"), request, [plan])
    sent = workload(plan, ShardReader(checkpoint("bert")).spec, request).sent_bytes()
    assert timed.sent_bytes == max(sent) > sent[0]
