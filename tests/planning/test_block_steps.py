"""Block parallelism as the planner sees it: the chosen ways are the best of all, and what follows from the sizes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.clusters import BERT, cluster, device, link

from isthmus.planning.inference import choose, costs_of, predict
from isthmus.planning.original_choice import OriginalChoice
from isthmus.planning.original_ways import ON_ALL
from isthmus.planning.plans import Question, allowed, expected_error
from isthmus.planning.step_seconds import Crew
from isthmus.planning.wire_errors import WIRE_ERRORS
from isthmus.spec.cluster import ClusterProfile, CodecTimes, WidthTimes
from isthmus.spec.decoupling import Decoupling
from isthmus.spec.inference import CODECS, GENERATING, ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.spec.transformer import TransformerSpec


def decoupled(num_layers: int = 12, originals: tuple[int, ...] = (2, 5, 8, 11), num: int = 4) -> TransformerSpec:
    widths = (BERT.hidden_size // num,) * num
    form = Decoupling(num_sub_blocks=num, original_layers=originals, widths=widths)
    return replace(BERT, num_layers=num_layers, decoupling=form)


def profile(spec: TransformerSpec, rates: tuple[float, ...], bytes_per_s: float) -> ClusterProfile:
    def one(flops: float) -> Any:
        plain = device(spec, flops)
        whole = plain.layers["fp32"][0]
        quarter = plain.layers["fp32"][2]
        times = WidthTimes(share=0.25, attention=quarter.attention, mlp=quarter.mlp)
        assert whole.share == 1.0
        return replace(plain, sub_block={"fp32": times})

    return cluster([one(rate) for rate in rates], [link(bytes_per_s)] * len(rates))


@pytest.mark.parametrize("mbit_per_s", [1000, 125, 25])
@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("rates", [(24e9,) * 4, (24e9, 48e9, 6e9)])
@pytest.mark.parametrize("originals", [(2, 5), (1, 2, 5), (0, 3), (1, 4)])
def test_no_other_ways_are_faster(
    originals: tuple[int, ...], rates: tuple[float, ...], tokens: int, mbit_per_s: int
) -> None:
    spec = decoupled(6, originals)
    question = Question(
        spec=spec,
        request=InferenceRequest(num_tokens=tokens),
        profile=profile(spec, rates, mbit_per_s * 125e3),
        strategies=("block",),
    )
    chosen = choose(question).chosen
    everything = itertools.product(ORIGINAL_PLANS, repeat=len(originals))
    seconds = [predict(question, replace(chosen.plan, originals=kinds)).latency_s for kinds in everything]
    assert chosen.latency_s <= min(seconds) * (1 + 1e-9)


def test_slow_links_gather_and_fast_ones_divide() -> None:
    spec = decoupled()
    chosen = {}
    for mbit_per_s in (25, 10_000):
        question = Question(
            spec=spec,
            request=InferenceRequest(num_tokens=128),
            profile=profile(spec, (24e9,) * 4, mbit_per_s * 125e3),
            strategies=("block",),
        )
        chosen[mbit_per_s] = set(choose(question).chosen.plan.originals)
    assert chosen[25] <= {"gather", "tokens"} and chosen[10_000] <= {"tokens", "sequence", "tensor"}


def test_a_fast_device_computes_for_all() -> None:
    spec = decoupled(originals=(5, 11))
    question = Question(
        spec=spec,
        request=InferenceRequest(num_tokens=128),
        profile=profile(spec, (2e9, 200e9), 125e6),
        strategies=("block",),
    )
    assert "fastest" in choose(question).chosen.plan.originals


def test_every_prediction_is_above_its_bound() -> None:
    spec = decoupled()
    question = Question(
        spec=spec,
        request=InferenceRequest(num_tokens=128),
        profile=profile(spec, (24e9,) * 4, 125e5),
        codecs=allowed(1.0)[0],
    )
    for candidate in choose(question).candidates:
        assert candidate.latency_s >= candidate.bound_s * 0.999, candidate.plan


LINKS = st.floats(1e5, 1e9)
BUDGETS = st.sampled_from([1e-4, 2e-3, 5e-3, 9e-3, 0.013, 0.03, 0.11, 0.16, 0.3])


@settings(max_examples=20, deadline=None)
@given(
    originals=st.sampled_from([(2, 5), (1, 2), (0, 3), (1, 4)]),
    rates=st.sampled_from([(24e9,) * 3, (24e9, 48e9, 6e9), (2e9, 200e9)]),
    tokens=st.sampled_from([1, 16, 128]),
    rate=LINKS,
    max_error=BUDGETS,
)
def test_no_other_ways_and_codecs_are_faster_within_the_error_that_is_allowed(
    originals: tuple[int, ...], rates: tuple[float, ...], tokens: int, rate: float, max_error: float
) -> None:
    """Brute force over every way and codec of every original layer."""
    spec = decoupled(6, originals)
    question = Question(
        spec=spec,
        request=InferenceRequest(num_tokens=tokens),
        profile=priced(profile(spec, rates, rate)),
        strategies=("block",),
        codecs=CODECS,
        max_error=max_error,
    )
    chosen = choose(question).chosen
    assert expected_error(chosen.plan, spec, question.request) <= max_error * (1 + 1e-6)
    choices = itertools.product(itertools.product(ORIGINAL_PLANS, CODECS), repeat=len(originals))
    best_s = min(
        predict(question, plan).latency_s
        for plan in (with_choices(chosen.plan, each) for each in choices)
        if expected_error(plan, spec, question.request) <= max_error
    )
    assert chosen.latency_s <= best_s * (1 + 1e-9)


def with_choices(plan: InferencePlan, choices: tuple[tuple[str, str], ...]) -> InferencePlan:
    ways, wires = zip(*choices, strict=True)
    return replace(plan, originals=ways, codecs=wires)


def priced(plain: ClusterProfile) -> ClusterProfile:
    """With codecs of which narrower ones take longer."""
    times = {name: CodecTimes(encode_s=cost * 2e-9, decode_s=cost * 1e-9) for cost, name in enumerate(CODECS)}
    return replace(plain, devices=tuple(replace(each, codecs=times) for each in plain.devices))


def test_more_error_allowed_is_never_slower_and_mixes_codecs_in_between() -> None:
    spec = decoupled()
    request = InferenceRequest(num_tokens=128)
    found = []
    for max_error in (0.0, 0.003, 0.006, 0.02, 0.05, 0.12, 0.2, 0.3):
        question = Question(
            spec=spec,
            request=request,
            profile=priced(profile(spec, (24e9,) * 4, 3e6)),
            strategies=("block",),
            codecs=CODECS,
            max_error=max_error,
        )
        found.append(choose(question).chosen)
        assert expected_error(found[-1].plan, spec, request) <= max_error * (1 + 1e-6)
    assert found[0].plan.wire == "fp32" and found[-1].plan.wire == "int4"
    assert any(candidate.plan.codecs for candidate in found)
    seconds = [candidate.latency_s for candidate in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] < 0.9 * seconds[0]


@pytest.mark.parametrize("max_error", [0.0, 1e-3])
@pytest.mark.parametrize("num_new_tokens", [0, 8])
def test_an_error_that_no_lossy_codec_is_within_leaves_fp32(max_error: float, num_new_tokens: int) -> None:
    spec = replace(decoupled(), is_decoder=True)
    question = Question(
        spec=spec,
        request=InferenceRequest(num_tokens=128, num_new_tokens=num_new_tokens),
        profile=profile(spec, (24e9,) * 4, 1e6),
        codecs=CODECS,
        max_error=max_error,
    )
    assert {candidate.plan.wire for candidate in choose(question).candidates} == {"fp32"}


def test_exchanges_of_single_tokens_are_exact() -> None:
    """Only the prompts' are rounded."""
    spec = replace(decoupled(), is_decoder=True)
    plan = replace(InferencePlan.even("block", 4, codec="int8"), originals=("tensor", "gather", "gather", "gather"))
    [whole, generating] = [InferenceRequest(num_tokens=9, num_new_tokens=count) for count in (0, 30)]
    assert expected_error(plan, spec, generating) == expected_error(plan, spec, whole) > 0
    assert {*GENERATING} == {*plan.originals}


@pytest.mark.parametrize(
    ("kind", "num_exchanges"), [("gather", 1), ("tokens", 1), ("sequence", 2), ("tensor", 5), ("fastest", 3)]
)
def test_the_error_of_a_layer_is_that_of_the_exchanges_it_brings_about(kind: str, num_exchanges: int) -> None:
    """The last layer: of ``fastest`` the slices come together in the end."""
    spec = decoupled(6, (2, 5))
    plan = replace(InferencePlan.even("block", 4), originals=("gather", kind), codecs=("fp32", "int8"))
    error = expected_error(plan, spec, InferenceRequest(num_tokens=16))
    assert error == pytest.approx(WIRE_ERRORS["int8"] * num_exchanges**0.5)


@pytest.mark.parametrize("mbit_per_s", [25, 1000])
def test_of_each_number_of_whole_layers_the_fastest_ways_are_found(mbit_per_s: int) -> None:
    """Against all ways of three original layers."""
    spec = decoupled(6, (1, 3, 4))
    cluster = profile(spec, (24e9, 12e9, 30e9), mbit_per_s * 125e3)
    question = Question(spec=spec, request=InferenceRequest(num_tokens=64), profile=cluster)
    plan = InferencePlan(strategy="block", devices=(0, 1, 2), weights=(3.0, 2.0, 3.0))
    crew = Crew.of(costs_of(question, "fp32"), plan.devices, 3)
    kinds = (*ON_ALL, "tensor")
    found = OriginalChoice(plan, spec, question.request, crew.steps_s).by_num_whole(kinds, ("fp32",))
    best_s = dict.fromkeys(range(4), math.inf)
    for ways in itertools.product(kinds, repeat=3):
        num_whole = sum(way in ON_ALL for way in ways)
        best_s[num_whole] = min(best_s[num_whole], predict(question, replace(plan, originals=ways)).latency_s)
    assert {count: predict(question, each).latency_s for count, (_, each) in found.items()} == pytest.approx(best_s)
