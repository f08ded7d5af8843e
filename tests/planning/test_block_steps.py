"""Block parallelism as the planner sees it: the chosen ways are the best of all, and what follows from the sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from tests.planning.clusters import BERT, cluster, device, link

from isthmus.planning.block_steps import best_originals
from isthmus.planning.inference import choose, predict
from isthmus.planning.plans import Question, allowed
from isthmus.spec.cluster import ClusterProfile, WidthTimes
from isthmus.spec.decoupling import Decoupling
from isthmus.spec.inference import ORIGINAL_PLANS, InferencePlan, InferenceRequest
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
    plan = InferencePlan.even("block", 4)
    assert len(best_originals(plan, spec, question.request, lambda steps: float(len(steps)))) == 4
