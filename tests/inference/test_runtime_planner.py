"""The plan of the next request: by its size, and by what links let through in the last one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planning.test_block_steps import decoupled
from tests.planning.test_residency import MBIT, fits_beside, question

from isthmus.inference.runtime_planner import Answer, RuntimePlanner
from isthmus.planning.device_costs import PROCESS_BYTES
from isthmus.planning.inference import predict
from isthmus.planning.pieces import resident_bytes
from isthmus.planning.residency import plans_to_keep, slowed
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest

ASKED = question(decoupled())
REQUEST = ASKED.request


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def planner(clock: Clock) -> RuntimePlanner:
    return RuntimePlanner(ASKED, PLANS, clock)


PLANS = plans_to_keep(ASKED).plans
NOTHING = [[0.0] * 3] * 3


def rates(bytes_per_s: float, *, slow: int | None = None, slow_bytes_per_s: float = 0.0) -> list[list[float]]:
    """What three devices that exchange with one another see, each link being shared by two messages."""
    own = [slow_bytes_per_s if device == slow else bytes_per_s for device in range(3)]
    return [[min(own[to], own[source]) / 2 if to != source else 0.0 for source in range(3)] for to in range(3)]


def test_nothing_has_changed_while_links_are_as_measured(planner: RuntimePlanner) -> None:
    for seen in (125 * MBIT, 110 * MBIT, 300 * MBIT):
        planner.observe(rates(seen))
        assert planner.slowdowns() == (1.0, 1.0, 1.0) and planner.choose(REQUEST) == 0


def test_links_at_a_tenth_change_the_plan_of_the_next_request(planner: RuntimePlanner) -> None:
    assert planner.choose(REQUEST) == 0
    planner.observe(rates(12.5 * MBIT))
    assert planner.slowdowns() == pytest.approx((10, 10, 10), rel=0.1)
    changed = planner.choose(REQUEST)
    assert changed != 0
    planner.observe(rates(125 * MBIT))
    assert planner.choose(REQUEST) == 0


def test_one_slow_link_is_told_from_the_others(planner: RuntimePlanner) -> None:
    planner.observe(rates(125 * MBIT, slow=1, slow_bytes_per_s=12.5 * MBIT))
    factors = planner.slowdowns()
    assert factors[1] == pytest.approx(10, rel=0.1) and factors[0] == factors[2] == 1.0


def test_what_is_known_fades(planner: RuntimePlanner, clock: Clock) -> None:
    planner.observe(rates(12.5 * MBIT))
    before = planner.slowdowns()
    clock.now_s = 30.0
    assert [after**2 for after in planner.slowdowns()] == pytest.approx(before, rel=0.25)
    clock.now_s = 600.0
    assert planner.slowdowns() == (1.0, 1.0, 1.0)


def test_devices_that_were_not_heard_of_keep_what_is_known(planner: RuntimePlanner) -> None:
    planner.observe(rates(12.5 * MBIT))
    before = planner.slowdowns()
    planner.observe([[0.0] * 3] * 3)
    assert planner.slowdowns() == before


@pytest.mark.parametrize("num_tokens", [1, 16, 128, 512])
@pytest.mark.parametrize("factor", [1.0, 4.0, 16.0])
def test_the_choice_is_the_fastest_of_those_that_are_there(num_tokens: int, factor: float) -> None:
    plans = tuple(
        InferencePlan(strategy="block", devices=(0, 1, 2), weights=(1.0,) * 3, originals=(kind,) * 4)
        for kind in ("gather", "tensor", "sequence", "fastest")
    )
    planner = RuntimePlanner(ASKED, plans)
    planner.observe(rates(125 * MBIT / factor))
    request = InferenceRequest(num_tokens=num_tokens)
    there = replace(ASKED, request=request, profile=slowed(ASKED.profile, planner.slowdowns()))
    seconds = [predict(there, plan).latency_s for plan in plans]
    assert planner.choose(request) == seconds.index(min(seconds))


def test_a_plan_that_takes_longer_than_predicted_gives_way(planner: RuntimePlanner) -> None:
    first = planner.choose(REQUEST)
    seconds = {number: predict(ASKED, plan).latency_s for number, plan in enumerate(PLANS)}
    for _ in range(12):
        number = planner.choose(REQUEST)
        took_s = seconds[number] * (2.0 if number == first else 1.0)
        planner.observe(NOTHING, Answer(request=REQUEST, number=number, seconds=took_s))
    assert planner.choose(REQUEST, may_try=False) != first
    longer = replace(REQUEST, num_tokens=8 * REQUEST.num_tokens)
    assert planner.choose(longer) == RuntimePlanner(ASKED, PLANS).choose(longer)


def test_a_slow_link_is_not_blamed_on_the_plan(planner: RuntimePlanner) -> None:
    """What was answered over links at a tenth took longer, as long as such links let predict."""
    first = planner.choose(REQUEST)
    slow = replace(ASKED, profile=slowed(ASKED.profile, (10.0,) * 3))
    answer = Answer(request=REQUEST, number=first, seconds=predict(slow, PLANS[first]).latency_s)
    for _ in range(5):
        planner.observe(rates(12.5 * MBIT), answer)
        assert planner.slowdowns() == pytest.approx((10, 10, 10), rel=0.1)
    planner.observe(rates(125 * MBIT))
    assert planner.choose(REQUEST, may_try=False) == first


def test_links_that_seem_slow_while_the_answer_comes_as_ever_are_not(planner: RuntimePlanner) -> None:
    """Who computes, or is interrupted, reads late what is there."""
    first = planner.choose(REQUEST)
    answer = Answer(request=REQUEST, number=first, seconds=predict(ASKED, PLANS[first]).latency_s)
    for _ in range(5):
        planner.observe(rates(12.5 * MBIT), answer)
        assert planner.slowdowns() == (1.0, 1.0, 1.0) and planner.choose(REQUEST) == first
    planner.observe(rates(12.5 * MBIT), replace(answer, seconds=10 * answer.seconds))
    assert planner.slowdowns() == pytest.approx((10, 10, 10), rel=0.1)
    planner.observe(rates(125 * MBIT), answer)
    assert planner.slowdowns() == (1.0, 1.0, 1.0)


def test_a_plan_that_does_not_fit_beside_what_is_loaded_is_never_taken() -> None:
    """On device 1 weights leave room for a request of 128 tokens, not for one of 512."""
    plans = tuple(
        InferencePlan(strategy="block", devices=(0, device), weights=(1.0, 1.0), originals=("tokens",) * 4)
        for device in (1, 2)
    )
    resident = resident_bytes(plans, ASKED.spec, 3)
    asked = replace(ASKED, memory_bytes=(None, PROCESS_BYTES + resident[1] + (30 << 20), None))
    planner, taken = RuntimePlanner(asked, plans), {}
    for num_tokens in (128, 512):
        request = InferenceRequest(num_tokens=num_tokens)
        weighed = [predict(replace(asked, request=request), plan) for plan in plans]
        assert weighed[0].latency_s < weighed[1].latency_s
        taken[num_tokens] = planner.choose(request)
        assert fits_beside(weighed[taken[num_tokens]], resident)
    assert taken == {128: 0, 512: 1}


def test_memory_is_given_back_at_once_only_where_a_request_would_not_fit_else() -> None:
    plans = PLANS[:1]
    generous = question(decoupled())
    beside = {
        tokens: predict(replace(generous, request=InferenceRequest(num_tokens=tokens)), plans[0]).beside_bytes
        for tokens in (128, 512)
    }
    resident = resident_bytes(plans, ASKED.spec, 3, is_frugal=True)
    room = [max(few, many - (8 << 20)) for few, many in zip(beside[128], beside[512], strict=True)]
    memory_bytes = tuple(PROCESS_BYTES + resident[rank] + room[number] for number, rank in enumerate(plans[0].devices))
    planner = RuntimePlanner(replace(ASKED, is_frugal=True, memory_bytes=memory_bytes), plans)
    for tokens, gives_back in ((128, False), (512, True)):
        request = InferenceRequest(num_tokens=tokens)
        assert planner.choose(request) == 0 and planner.gives_back(request, 0) is gives_back
    assert not RuntimePlanner(ASKED, plans).gives_back(InferenceRequest(num_tokens=512), 0)


def test_a_request_that_nothing_fits_is_told_what_is_missing() -> None:
    asked = question(decoupled(), 250)
    planner = RuntimePlanner(asked, plans_to_keep(asked).plans[:1])
    assert planner.choose(REQUEST) == 0
    with pytest.raises(IsthmusError, match=r"fits a request of 64 × 512 tokens; .* MiB on rank \d"):
        planner.choose(InferenceRequest(num_tokens=512, batch=64))
