"""Which plans stay loaded: against other sets of plans, in memory of every size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.planning.clusters import BERT, even_cluster
from tests.planning.test_block_steps import decoupled, profile

from isthmus.planning import residency
from isthmus.planning.device_costs import PROCESS_BYTES
from isthmus.planning.inference import Weighed, choose, costs_of, forecast, predict, weigh, weigh_slowed
from isthmus.planning.pieces import held_bytes, pieces_of, resident_bytes, weights_bytes
from isthmus.planning.plans import Question
from isthmus.planning.residency import plans_to_keep, requests, slowed
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import TransformerSpec

MBIT = 125e3


def question(spec: TransformerSpec, memory_mib: int | None = None, num_devices: int = 3) -> Question:
    rates = (24e9, 30e9, 12e9)[:num_devices]
    measured = even_cluster(num_devices, 125 * MBIT, spec)
    if spec.decoupling is not None:
        measured = profile(spec, rates, 125 * MBIT)
    limit = None if memory_mib is None else PROCESS_BYTES + (memory_mib << 20)
    return Question(
        spec=spec,
        request=InferenceRequest(num_tokens=128),
        profile=measured,
        memory_bytes=(limit,) * num_devices,
    )


def situations(asked: Question) -> list[Question]:
    return [
        replace(asked, request=request, profile=slowed(asked.profile, [factor] * len(asked.profile.links)))
        for request in requests(asked)
        for factor in residency.SLOWDOWNS
    ]


def cost_of(asked: Question, kept: Sequence[Sequence[Weighed]], fastest_s: list[float], chosen: InferencePlan) -> float:
    """What the search minimises, by its definition; infinite where some situation is left without a plan. ``kept``: by
    plan and situation."""
    plans = [own[0].plan for own in kept]
    resident = resident_bytes(plans, asked.spec, 3, is_frugal=asked.is_frugal)
    losses, is_chosen_there = [], False
    for number, (weighed, best_s) in enumerate(zip(zip(*kept, strict=True), fastest_s, strict=True)):
        there = [each for each in weighed if fits_beside(each, resident)]
        if number == 0:
            is_chosen_there = any(each.plan == chosen for each in there)
        if math.isfinite(best_s):
            losses.append(math.log(min((each.price_s for each in there), default=math.inf) / best_s))
    favour = 0.0 if is_chosen_there else residency._FAVOUR
    return sum(losses) / len(losses) + (len(plans) - 1) * residency._PRICE + favour


def fastest_of(plans: Sequence[InferencePlan], asked: Question) -> float:
    """Seconds of those that fit alone; infinite where none does. One that was found for another situation may be it."""
    costs = costs_of(asked, "fp32")
    weighed = [each for plan in plans for each in forecast(asked, plan, costs=costs)]
    return min((each.price_s for each in weighed if each.fits), default=math.inf)


def fits_beside(weighed: Weighed, resident: list[int]) -> bool:
    """Whether it fits beside the weights of all plans that are there."""
    parts = zip(weighed.plan.devices, weighed.beside_bytes, weighed.budget_bytes, strict=True)
    return all(resident[rank] + beside <= budget for rank, beside, budget in parts)


@pytest.mark.parametrize("memory_mib", [58, 60, 62, 90, 130, 160, 270, 1000])
@pytest.mark.parametrize("form", ["plain", "decoupled"])
def test_no_other_plans_lose_less(form: str, memory_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every set of up to three plans that fit together in every situation in which one fits."""
    monkeypatch.setattr(residency, "TOKENS", (16, 512))
    monkeypatch.setattr(residency, "SLOWDOWNS", (1.0, 16.0))
    spec = replace(BERT, num_layers=3) if form == "plain" else decoupled(3, (2,), 4)
    asked = question(spec, memory_mib)
    try:
        kept = plans_to_keep(asked)
    except IsthmusError as error:
        assert "memory: no plan fits" in str(error)
        with pytest.raises(IsthmusError):
            choose(replace(asked, is_frugal=True))
        return
    asked = replace(asked, is_frugal=kept.is_frugal)
    all_asked = situations(asked)
    pools = [[each for each in weigh(situation) if each.fits] for situation in all_asked]
    every = list(dict.fromkeys(each.plan for pool in pools for each in pool))
    fastest_s = [fastest_of(every, situation) for situation in all_asked]
    chosen = choose(asked).chosen.plan
    fast = [each.plan for pool in pools for each in sorted(pool, key=lambda each: each.latency_s)[:4]]
    small = [min(pool, key=lambda each: max(each.memory_bytes)).plan for pool in pools if pool]
    others = list(dict.fromkeys([*kept.plans, chosen, *small, *fast]))[:10]
    weighed = [[predict(situation, plan) for situation in all_asked] for plan in others]
    cost = cost_of(asked, weighed[: len(kept.plans)], fastest_s, chosen)
    price = (len(kept.plans) - 1) * residency._PRICE + (0 if chosen in kept.plans else residency._FAVOUR)
    assert math.log(kept.loss) + price == pytest.approx(cost)
    for size in range(1, 4):
        for some in itertools.combinations(weighed, size):
            assert cost <= cost_of(asked, some, fastest_s, chosen) + 1e-9


@pytest.mark.parametrize("memory_mib", [180, 210, 230, 270])
def test_in_every_situation_that_some_plan_fits_one_that_is_kept_does(memory_mib: int) -> None:
    asked = question(decoupled(), memory_mib)
    found = plans_to_keep(asked)
    asked, kept = replace(asked, is_frugal=found.is_frugal), found.plans
    resident, num_checked = resident_bytes(kept, asked.spec, 3, is_frugal=asked.is_frugal), 0
    for situation in situations(asked):
        if any(each.fits for each in weigh(situation)):
            num_checked += 1
            assert any(fits_beside(predict(situation, plan), resident) for plan in kept)
    assert num_checked == 12


def test_what_was_asked_for_comes_first_where_there_is_room() -> None:
    spec = decoupled()
    short = replace(question(spec, 230), is_frugal=True)
    ample, tight = plans_to_keep(question(spec)), plans_to_keep(short)
    assert ample.plans[0] == choose(question(spec)).chosen.plan
    assert ample.loss < 1.01 < tight.loss
    seconds = [predict(short, plan).latency_s for plan in tight.plans]
    assert tight.plans[0] != choose(short).chosen.plan and seconds[0] == min(seconds)
    assert "leave others too little memory" in tight.reason


@pytest.mark.parametrize("memory_mib", [200, 220])
def test_layers_that_do_not_fit_as_a_whole_are_divided_and_the_others_not(memory_mib: int) -> None:
    """Faster than all plans that compute every original layer in one way, and fit."""
    kept = plans_to_keep(question(decoupled(), memory_mib))
    asked = replace(question(decoupled(), memory_mib), is_frugal=kept.is_frugal)
    alike = [each.latency_s for each in weigh(asked) if each.fits and len(set(each.plan.originals)) < 2]
    first = predict(asked, kept.plans[0])
    assert "tensor" in first.plan.originals and set(first.plan.originals) - {"tensor"}
    assert first.latency_s < 0.95 * min(alike)


def test_devices_are_frugal_only_where_that_gains() -> None:
    found = {mib: plans_to_keep(question(decoupled(), mib)) for mib in (170, 240, 1000)}
    assert {mib: each.is_frugal for mib, each in found.items()} == {170: True, 240: True, 1000: False}
    asked = question(decoupled(), 240)
    weighed = [weigh_slowed(replace(asked, request=each), residency.SLOWDOWNS) for each in requests(asked)]
    at_ease, frugal = residency._kept(asked, weighed), residency._kept_frugally(asked, weighed)
    assert frugal.residency == found[240]
    assert frugal.num_situations > at_ease.num_situations or (at_ease.mean_log_s - frugal.mean_log_s > math.log(1.05))
    with pytest.raises(IsthmusError, match="memory: no plan fits"):
        choose(question(decoupled(), 170))


@pytest.mark.parametrize("slowdown", [1.0, 4.0, 16.0])
def test_slowed_links_are_weighed_as_slower_links_are(slowdown: float) -> None:
    spec = decoupled(6, (2, 5))
    asked = question(spec)
    bursting = [replace(each, burst_bytes=5e4, airtime_s_per_byte=1e-9) for each in asked.profile.links]
    asked = replace(asked, profile=replace(asked.profile, links=tuple(bursting)))
    [one, _] = weigh_slowed(asked, (slowdown, 64.0))
    found = {each.plan: each for each in one}
    for each in weigh(replace(asked, profile=slowed(asked.profile, [slowdown] * 3))):
        assert found[each.plan].latency_s == pytest.approx(each.latency_s)
        assert found[each.plan].memory_bytes == each.memory_bytes


def test_slower_links_take_longer_by_the_same_factor() -> None:
    measured = question(BERT).profile
    slower = slowed(measured, (1.0, 4.0, 16.0))
    assert slower.links[0] == measured.links[0]
    assert slower.links[1].bytes_per_s == measured.links[1].bytes_per_s / 4
    assert slower.links[2].transfer.seconds[-1] == pytest.approx(16 * measured.links[2].transfer.seconds[-1])
    shared = replace(measured, links=(replace(measured.links[0], airtime_s_per_byte=1e-8),) * 3)
    assert [link.airtime_s_per_byte for link in slowed(shared, (1.0, 4.0, 16.0)).links] == [1e-8, 4e-8, 16e-8]


@pytest.mark.parametrize("spec", [BERT, decoupled(6, (2, 5))], ids=["plain", "decoupled"])
def test_weights_of_a_plan_are_those_of_its_pieces(spec: TransformerSpec) -> None:
    """Of plans for two devices, for teams, and with layers that only some devices have."""
    strategies = ("tensor", "sequence", "pipeline") if spec.decoupling is None else ("block",)
    for strategy, num, ways in itertools.product(strategies, (2, 6), (("gather", "tensor"), ("fastest", "tokens"))):
        weights = (3.0, *(1.0,) * (num - 1))
        originals = ways if strategy == "block" else ()
        plan = InferencePlan(strategy=strategy, devices=tuple(range(num)), weights=weights, originals=originals)
        assert weights_bytes(plan, spec) == [held_bytes(spec, own) for own in pieces_of(plan, spec)]
