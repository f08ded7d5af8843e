"""Which plans stay loaded: against every set of plans, in memory of every size."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from tests.planning.clusters import BERT, even_cluster
from tests.planning.test_block_steps import decoupled, profile

from isthmus.planning import residency
from isthmus.planning.device_costs import PROCESS_BYTES
from isthmus.planning.inference import choose, predict
from isthmus.planning.pieces import held_bytes, pieces_of
from isthmus.planning.plans import Question
from isthmus.planning.residency import plans_to_keep, situations, slowed
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


def loss_of(asked: list[Question], plans: tuple[InferencePlan, ...], fastest_s: list[float]) -> float:
    """As ``Residency.loss``; infinite where the plans do not fit together."""
    spec, ranks = asked[0].spec, range(len(asked[0].profile.devices))
    losses = []
    rest = {rank: 0 for rank in ranks}
    for situation, best_s in zip(asked, fastest_s, strict=True):
        seconds = [1000 * best_s]
        for plan in plans:
            weighed = predict(situation, plan)
            if weighed.fits:
                seconds.append(weighed.latency_s)
                own = pieces_of(plan, spec)
                for device, need, pieces in zip(plan.devices, weighed.memory_bytes, own, strict=True):
                    rest[device] = max(rest[device], need - held_bytes(spec, pieces))
        losses.append(math.log(min(seconds) / best_s))
    for rank in ranks:
        held = [
            piece
            for plan in plans
            for device, pieces in zip(plan.devices, pieces_of(plan, spec), strict=True)
            if device == rank
            for piece in pieces
        ]
        if held_bytes(spec, held) + rest[rank] > asked[0].budget_bytes(rank):
            return math.inf
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("memory_mib", [60, 130, 270, 1000])
@pytest.mark.parametrize("form", ["plain", "decoupled"])
def test_no_other_plans_that_fit_lose_less(form: str, memory_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "TOKENS", (16, 128))
    monkeypatch.setattr(residency, "SLOWDOWNS", (1.0, 16.0))
    spec = replace(BERT, num_layers=3) if form == "plain" else decoupled(3, (2,), 4)
    asked = question(spec, memory_mib)
    try:
        kept = plans_to_keep(asked)
    except IsthmusError as error:
        assert "memory: no plan fits" in str(error)
        with pytest.raises(IsthmusError):
            choose(asked)
        return
    all_asked = situations(asked)
    pools = [[each for each in residency.weigh(situation) if each.fits] for situation in all_asked]
    fastest_s = [min((each.latency_s for each in pool), default=math.inf) for pool in pools]
    assert loss_of(all_asked, kept.plans, fastest_s) == pytest.approx(kept.loss)
    worth = [each.plan for pool in pools for each in residency._worth_keeping(pool)]
    others = [plan for plan in dict.fromkeys(worth) if plan != kept.plans[0]]
    price = math.exp(residency._PRICE)
    for size in range(min(3, len(others)) + 1):
        for more in itertools.combinations(others[:9], size):
            least = loss_of(all_asked, (kept.plans[0], *more), fastest_s) * price**size
            assert kept.loss * price ** (len(kept.plans) - 1) <= least * (1 + 1e-9)


def test_what_was_asked_for_comes_first_and_little_memory_keeps_less() -> None:
    spec = decoupled()
    ample, tight = plans_to_keep(question(spec)), plans_to_keep(question(spec, 250))
    assert ample.plans[0] == choose(question(spec)).chosen.plan
    assert tight.plans[0] == choose(question(spec, 250)).chosen.plan
    assert ample.loss < 1.01 < tight.loss


def test_slower_links_take_longer_by_the_same_factor() -> None:
    measured = question(BERT).profile
    slower = slowed(measured, (1.0, 4.0, 16.0))
    assert slower.links[0] == measured.links[0]
    assert slower.links[1].bytes_per_s == measured.links[1].bytes_per_s / 4
    assert slower.links[2].transfer.seconds[-1] == pytest.approx(16 * measured.links[2].transfer.seconds[-1])
    shared = replace(measured, links=(replace(measured.links[0], airtime_s_per_byte=1e-8),) * 3)
    assert [link.airtime_s_per_byte for link in slowed(shared, (1.0, 4.0, 16.0)).links] == [1e-8, 4e-8, 16e-8]
