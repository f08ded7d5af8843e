"""What is simulated is what the planner predicts: the same plans, the same seconds, the same choice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.planning.inference import choose, predict
from isthmus.simulation.devices import kind
from isthmus.simulation.inference import at_bandwidth, question_of, simulate
from isthmus.simulation.shapes import SHAPES, check_request, decoupled
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import ORIGINAL_PLANS, InferencePlan, InferenceRequest

BERT, GPT2 = SHAPES["bert-base"], SHAPES["gpt2"]
PIS = (kind("raspberry-pi-4b"),) * 4
REQUEST = InferenceRequest(num_tokens=128)


def test_rows_are_what_the_planner_predicts_for_the_same_plans() -> None:
    devices = (kind("raspberry-pi-5"), *PIS[:2])
    for row in simulate(BERT, REQUEST, devices, codecs=("fp32", "int8")):
        plan = InferencePlan(
            strategy=row.strategy,
            devices=tuple(range(row.num_devices)),
            weights=row.weights,
            codec=row.codec,
            algorithm=row.algorithm if row.strategy == "tensor" else "two_step",  # pyright: ignore[reportArgumentType]
        )
        predicted = predict(question_of(BERT, REQUEST, devices, codecs=("fp32", "int8")), plan)
        assert row.latency_s.median == row.predicted_latency_s == predicted.latency_s
        assert row.bound_s == predicted.bound_s and row.transport == "simulated"


def test_a_decoupled_model_has_every_way_beside_those_of_the_original() -> None:
    spec = decoupled(BERT, 4, 4)
    rows = simulate(spec, REQUEST, at_bandwidth(PIS, 125e6))
    found = {(row.strategy, row.algorithm) for row in rows}
    assert {("block", way) for way in ORIGINAL_PLANS} | {("single", ""), ("sequence", "")} <= found
    assert {way for strategy, way in found if strategy == "tensor"} == {"two_step", "mesh", "scatter"}
    assert "pipeline" not in {strategy for strategy, _ in found}
    [chosen] = [row for row in rows if row.is_choice]
    choice = choose(question_of(spec, REQUEST, at_bandwidth(PIS, 125e6))).chosen
    assert (chosen.latency_s.median, chosen.algorithm) == (choice.latency_s, choice.plan.way)
    assert sorted(row.num_sub_blocks for row in rows if row.strategy == "single") == [1, 4]
    assert [row.latency_s.median for row in rows] == sorted(row.latency_s.median for row in rows)


def test_several_sequences_may_go_through_a_pipeline() -> None:
    rows = simulate(BERT, replace(REQUEST, batch=8), PIS)
    assert "pipeline" in {row.strategy for row in rows}


def test_where_one_device_is_chosen_for_a_decoupled_model_the_row_says_which_model() -> None:
    rows = simulate(decoupled(BERT, 2, 4), REQUEST, at_bandwidth(PIS[:2], 1e4))
    [chosen] = [row for row in rows if row.is_choice]
    assert (chosen.strategy, chosen.num_sub_blocks, chosen.num_devices) == ("single", 2, 1)
    [original] = [row for row in rows if row.strategy == "single" and not row.is_choice]
    assert {row.num_sub_blocks for row in rows if row.strategy == "block"} == {2}
    assert {row.num_sub_blocks for row in rows if row.strategy in ("tensor", "sequence")} == {original.num_sub_blocks}
    assert original.num_sub_blocks == 1
    assert original.latency_s.median < chosen.latency_s.median  # there are more scores in sub-blocks


def test_more_bandwidth_is_never_slower() -> None:
    chosen = []
    for mbit_per_s in (25, 125, 1000):
        rows = simulate(decoupled(BERT, 4, 4), REQUEST, at_bandwidth(PIS, mbit_per_s * 1e6))
        chosen += [row.latency_s.median for row in rows if row.is_choice]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1]


def test_tokens_are_simulated_one_by_one() -> None:
    request = InferenceRequest(num_tokens=64, num_new_tokens=5)
    for row in simulate(GPT2, request, PIS):
        assert row.time_to_first_token_s is not None and row.time_per_token_s is not None
        total_s = row.time_to_first_token_s.median + 4 * row.time_per_token_s.median
        assert total_s == pytest.approx(row.latency_s.median)
    rows = simulate(GPT2, replace(request, num_new_tokens=1), PIS)
    assert all(row.time_to_first_token_s and row.time_per_token_s is None for row in rows)


def test_sixty_four_devices_are_simulated_all_at_once() -> None:
    rows = simulate(decoupled(BERT, 16, 4), REQUEST, PIS[:1] * 64, codecs=("int8",))
    most = {row.strategy: max(each.num_devices for each in rows if each.strategy == row.strategy) for row in rows}
    assert most == {"single": 1, "tensor": 64, "sequence": 64, "block": 64}


def test_the_same_question_has_the_same_answer() -> None:
    asked = decoupled(BERT, 4, 4), REQUEST, PIS
    assert simulate(*asked) == simulate(*asked)


def test_what_does_not_fit_is_left_out_and_nothing_at_all_is_an_error() -> None:
    small = tuple(replace(device, memory_bytes=950 << 20) for device in PIS)
    assert {row.strategy for row in simulate(BERT, REQUEST, small)} == {"tensor"}
    with pytest.raises(IsthmusError, match=r"memory: no plan fits; the smallest budget that would is \d+ MiB"):
        simulate(BERT, REQUEST, tuple(replace(device, memory_bytes=760 << 20) for device in PIS))


@pytest.mark.parametrize(
    ("spec", "request_", "message"),
    [
        (BERT, InferenceRequest(num_tokens=513), "tokens: got 513, wanted at most the 512 it allows"),
        (BERT, InferenceRequest(num_tokens=8, num_new_tokens=2), "new_tokens: got 2 for 'bert', an encoder; wanted 0"),
        (
            GPT2,
            InferenceRequest(num_tokens=1000, num_new_tokens=25),
            "new_tokens: got 25 after .* at most 24: the model",
        ),
    ],
)
def test_what_the_model_does_not_allow_is_refused(spec, request_: InferenceRequest, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        check_request(spec, request_)


def test_a_form_that_does_not_fit_is_refused() -> None:
    with pytest.raises(IsthmusError, match="sub_blocks: the model is decoupled already"):
        decoupled(decoupled(BERT, 4, 4), 4, 4)
    with pytest.raises(IsthmusError, match="sub_blocks: a hidden size of 768 cannot be cut into 5 equal slices"):
        decoupled(BERT, 5, 4)
