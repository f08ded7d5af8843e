"""What is kept beside the plans that are best by prediction: worth its expectation, and free where memory is short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.planning.test_block_steps import decoupled
from tests.planning.test_residency import fits_beside, question, situations

from isthmus.planning.alternatives import alternatives, expected_improvement
from isthmus.planning.experience import ERROR
from isthmus.planning.inference import Weighed, predict
from isthmus.planning.pieces import pieces_on, resident_bytes
from isthmus.planning.residency import plans_to_keep
from isthmus.spec.inference import InferencePlan


def weighed(plan: InferencePlan, seconds: float) -> Weighed:
    return Weighed(
        plan=plan, latency_s=seconds, first_token_s=seconds, weights_bytes=(), memory_bytes=(), budget_bytes=()
    )


def block(*originals: str, weights: Sequence[float] = (1.0, 1.0)) -> InferencePlan:
    return InferencePlan(strategy="block", devices=(0, 1), weights=tuple(weights), originals=originals)


@pytest.mark.parametrize("loss", [-0.2, 0.0, 0.05, 0.3])
def test_what_a_plan_improves_is_what_drawn_errors_let_it(loss: float) -> None:
    errors = np.random.default_rng(0).normal(0.0, ERROR, (2, 400_000))
    gained = np.maximum(0.0, errors[0] - (loss + errors[1]))
    assert expected_improvement(loss) == pytest.approx(gained.mean(), abs=4 * gained.std() / math.sqrt(gained.size))


def test_those_worth_most_are_kept_while_they_are_worth_it() -> None:
    best, near, far, elsewhere = block("tokens"), block("gather"), block("fastest"), block("tensor")
    alike = block("tokens", weights=(0.4, 0.6))
    first = [weighed(best, 1.0), weighed(near, 1.02), weighed(far, 1.12), weighed(alike, 1.0), weighed(elsewhere, 3.0)]
    second = [weighed(best, 2.0), weighed(near, 2.5), weighed(far, 2.3), weighed(elsewhere, 1.9)]
    situations = [(1.0, first), (2.0, second)]

    def found(most: int = 9, least_gain: float = 0.0, without: InferencePlan | None = None) -> list[InferencePlan]:
        return alternatives([best], situations, lambda plans: without not in plans, most=most, least_gain=least_gain)

    assert found() == [elsewhere, near, far]
    assert found(most=2) == [elsewhere, near]
    assert found(without=near) == [elsewhere, far]
    worth = (expected_improvement(math.log(1.02)) + expected_improvement(math.log(1.25))) / 2
    assert found(least_gain=worth * 0.999) == [elsewhere, near]
    assert found(least_gain=worth * 1.001) == [elsewhere]


@pytest.mark.parametrize(("memory_mib", "is_frugal"), [(200, True), (250, True), (260, False), (270, False)])
def test_what_is_kept_beside_leaves_every_request_its_room(memory_mib: int, is_frugal: bool) -> None:
    """And frugal devices hold nothing more for it."""
    asked = question(decoupled(), memory_mib)
    kept = plans_to_keep(asked)
    spec = asked.spec
    assert kept.is_frugal == is_frugal
    assert kept.alternatives or memory_mib == 200
    assert not set(kept.alternatives) & set(kept.plans)
    more = [pieces_on(rank, kept.all_plans, spec) - pieces_on(rank, kept.plans, spec) for rank in range(3)]
    assert any(more) != is_frugal
    before, after = (resident_bytes(plans, spec, 3, is_frugal=is_frugal) for plans in (kept.plans, kept.all_plans))
    num_fitting = 0
    for situation in situations(replace(asked, is_frugal=is_frugal)):
        for plan in kept.plans:
            candidate = predict(situation, plan)
            num_fitting += fits_beside(candidate, before)
            assert fits_beside(candidate, after) == fits_beside(candidate, before)
    assert num_fitting >= 12
