"""More devices than sub-blocks: teams are the best there are, everything is somewhere once, and the planner knows when
they pay."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.clusters import BERT
from tests.planning.test_block_steps import decoupled, priced, profile, with_choices
from tests.planning.test_subsets import sets_of

from isthmus.planning.block_layout import COLUMNS, FASTEST, PARTS, TOKENS, BlockLayout, Rectangle, _teams
from isthmus.planning.inference import choose, costs_of, predict
from isthmus.planning.plans import Question, expected_error
from isthmus.planning.steps import Work
from isthmus.simulation.devices import kind
from isthmus.simulation.inference import question_of
from isthmus.spec.decoupling import Decoupling
from isthmus.spec.inference import CODECS, ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.spec.transformer import Range, TransformerSpec

REQUEST = InferenceRequest(num_tokens=128)
WEIGHTS = st.lists(st.sampled_from([0.0, 0.1, 0.45, 0.6, 1.0, 3.0]), min_size=1, max_size=9).filter(any)


def form(widths: tuple[int, ...]) -> TransformerSpec:
    return replace(BERT, decoupling=Decoupling(num_sub_blocks=len(widths), original_layers=(2,), widths=widths))


def layout(weights: list[float], spec: TransformerSpec) -> BlockLayout:
    plan = InferencePlan(strategy="block", devices=tuple(range(len(weights))), weights=tuple(weights))
    return BlockLayout.of(plan, spec)


@given(weights=st.lists(st.sampled_from([0.1, 0.45, 0.6, 1.0, 3.0]), min_size=4, max_size=9))
def test_no_other_teams_of_neighbours_end_sooner(weights: list[float]) -> None:
    widths = (128, 384, 256)

    def slowest_first(stops: tuple[int, ...]) -> list[float]:
        sums = [sum(weights[start:stop]) for start, stop in itertools.pairwise((0, *stops, len(weights)))]
        return sorted((width / work for width, work in zip(widths, sums, strict=True)), reverse=True)

    teams = _teams(weights, widths)
    found = slowest_first(tuple(team.stop for team in teams[:-1]))
    assert found == min(map(slowest_first, itertools.combinations(range(1, len(weights)), 2)))


def test_even_devices_form_even_teams() -> None:
    assert sorted(len(team) for team in _teams((1.0,) * 11, (192,) * 4)) == [2, 3, 3, 3]


@settings(deadline=None)
@given(weights=WEIGHTS, widths=st.sampled_from([(384, 384), (128, 384, 256), (192,) * 4]))
def test_every_head_column_and_value_is_somewhere_once(weights: list[float], widths: tuple[int, ...]) -> None:
    spec = form(widths)
    found = layout(weights, spec)
    computed: Counter[tuple[str, int, int]] = Counter()
    for part in found.parts:
        for block, share in part.held(spec):
            for what, own in (("head", share.heads), ("column", share.columns)):
                computed.update((what, block.units.start, each) for each in range(own.start, own.stop))
    assert set(computed.values()) == {1}
    assert len(computed) == len(widths) * (spec.num_heads + spec.intermediate_size)
    whole = Rectangle(tokens=Range(start=0, stop=7), units=Range(start=0, stop=spec.hidden_size))
    for state in (TOKENS, FASTEST, PARTS, COLUMNS):
        held = found.rectangles(state, 7)
        assert sum(each.area for each in held) == whole.area
        assert not any(one.common(other).area for one, other in itertools.combinations(held, 2))
        assert found.areas("whole", state, 7)[0] == [each.area for each in held]


def eight(mbit_per_s: float, spec: TransformerSpec | None = None) -> Question:
    devices = (replace(kind("raspberry-pi-4b"), bits_per_s=mbit_per_s * 1e6),) * 8
    return question_of(spec or decoupled(), REQUEST, devices)


def test_eight_devices_of_a_model_of_four_sub_blocks_are_used_where_links_allow_it() -> None:
    for mbit_per_s, times_as_fast in ((1000, 1.4), (125, 1.0)):
        choice = choose(eight(mbit_per_s))
        four_s = min(each.latency_s for each in choice.candidates if len(each.plan.devices) <= 4)
        assert len(choice.chosen.plan.devices) == 8 and four_s > times_as_fast * choice.chosen.latency_s
    assert len(choose(eight(5)).chosen.plan.devices) <= 4


def test_of_sets_larger_than_the_number_of_sub_blocks_few_are_weighed() -> None:
    sizes = Counter(len(each) for each in sets_of(eight(125)))
    assert [sizes[size] for size in range(1, 5)] == [1, 7, 21, 35]
    assert all(1 <= sizes[size] <= 4 for size in range(5, 9))


@pytest.mark.parametrize("rates", [(24e9,) * 6, (24e9, 48e9, 6e9, 12e9, 24e9)])
@pytest.mark.parametrize("originals", [(2, 5), (1, 2), (0, 3), (1, 4)])
def test_no_other_ways_and_codecs_of_teams_are_faster(originals: tuple[int, ...], rates: tuple[float, ...]) -> None:
    spec, max_error = decoupled(6, originals), 0.025
    question = Question(
        spec=spec,
        request=REQUEST,
        profile=priced(profile(spec, rates, 125e5)),
        strategies=("block",),
        codecs=CODECS,
        max_error=max_error,
    )
    all_of_them = [each for each in choose(question).candidates if len(each.plan.devices) == len(rates)]
    assert all(each.latency_s >= each.bound_s for each in all_of_them)
    best = min(all_of_them, key=lambda each: each.latency_s)
    choices = itertools.product(itertools.product(ORIGINAL_PLANS, CODECS[:3]), repeat=len(originals))
    plans = [with_choices(best.plan, each) for each in choices]
    others_s = [predict(question, plan).latency_s for plan in plans if expected_error(plan, spec, REQUEST) <= max_error]
    assert best.latency_s <= min(others_s) * (1 + 1e-9)


def test_errors_of_sums_count_where_the_leader_has_no_mates() -> None:
    """Four exchanges a layer more, of three before the first original one: what is there needs no gathering."""
    spec = decoupled(6, (3,))
    found = [
        expected_error(replace(InferencePlan.even("block", num, codec="bf16"), originals=("gather",)), spec, REQUEST)
        for num in (4, 5)
    ]
    assert layout([1.0] * 5, spec).parts[0].share is None
    assert (found[1] / found[0]) ** 2 == pytest.approx((2 + 3 * 4 - 1 + 2 * 4 - 1) / 2)


@pytest.mark.parametrize("block", ["attention", "mlp"])
@pytest.mark.parametrize("tokens", [1, 128])
def test_half_of_a_sub_block_takes_half_or_more(tokens: int, block: str) -> None:
    question = eight(125)
    costs = costs_of(question, "fp32")[0]
    whole_s, half_s, nothing_s = (
        costs.work_s(
            Work(
                block_rows=tokens,
                block_share=0.25,
                block_heads=part if block == "attention" else 0.0,
                block_columns=part if block == "mlp" else 0.0,
            )
        )
        for part in (1.0, 0.5, 0.0)
    )
    assert nothing_s == 0.0
    assert whole_s / 2 <= half_s < whole_s
