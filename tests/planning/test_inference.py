"""The planner of inference: never over memory, never fooled by a link, and the best of all that it could have taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.clusters import BERT, LLAMA, cluster, device, even_cluster, link

from isthmus.planning.device_costs import PROCESS_BYTES, weight_bytes
from isthmus.planning.inference import choose, predict, weigh
from isthmus.planning.plans import Question, allowed, expected_error
from isthmus.planning.wire_errors import WIRE_ERRORS
from isthmus.planning.workload import device_shares, layer_ranges
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import CODECS, InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare
from isthmus.transport.codec import create_codec

MIB = 1 << 20
REQUEST = InferenceRequest(num_tokens=128)
SPEEDS = st.lists(st.floats(1e9, 1e11), min_size=1, max_size=4)
RATES = st.floats(1e5, 1e9)


def question(profile, **options) -> Question:
    return Question(**{"spec": BERT, "request": REQUEST, "profile": profile, **options})


@settings(max_examples=25)
@given(speeds=SPEEDS, rate=RATES, free=st.lists(st.integers(40 * MIB, 600 * MIB), min_size=4, max_size=4))
def test_no_plan_that_is_chosen_exceeds_any_memory(speeds: list[float], rate: float, free: list[int]) -> None:
    devices = [device(BERT, speed, free_memory_bytes=room) for speed, room in zip(speeds, free, strict=False)]
    asked = question(cluster(devices, [link(rate)] * len(devices)))
    try:
        chosen = choose(asked).chosen
    except IsthmusError:
        assert not any(candidate.fits for candidate in weigh(asked))
        return
    shares, layers = device_shares(chosen.plan, BERT), layer_ranges(chosen.plan, BERT)
    for rank, share, own_layers in zip(chosen.plan.devices, shares, layers, strict=True):
        assert weight_bytes(BERT, share, "fp32", len(own_layers)) < free[rank]


def test_weights_move_to_devices_that_have_room() -> None:
    """A fast device without room holds what it can, the slow one the rest."""
    fast, slow = device(BERT, 48e9, free_memory_bytes=120 * MIB), device(BERT, 12e9, free_memory_bytes=400 * MIB)
    asked = question(cluster([fast, slow], [link(1e9)] * 2), strategies=("tensor",))
    chosen = choose(asked).chosen
    assert chosen.memory_bytes[0] <= 120 * MIB and chosen.memory_bytes[1] <= 400 * MIB
    assert chosen.memory_bytes[0] > 60 * MIB


def test_where_nothing_fits_the_smallest_budget_that_would_is_named_and_is_true() -> None:
    def ask(limit: int) -> Question:
        return question(even_cluster(4, 1e8), memory_bytes=(limit,) * 4)

    with pytest.raises(IsthmusError, match=r"memory: no plan fits; .* is \d+ MiB on each of 4 devices") as caught:
        choose(ask(PROCESS_BYTES + 20 * MIB))
    named = int(str(caught.value).split(" MiB on each")[0].rpartition(" ")[2])
    assert choose(ask((named + 1) * MIB)).chosen.fits
    with pytest.raises(IsthmusError, match="memory: no plan fits"):
        choose(ask((named - 2) * MIB))


@settings(max_examples=25)
@given(speeds=SPEEDS, rate=RATES, factor=st.floats(1, 100), burst=st.sampled_from([0.0, 65536.0]))
def test_more_bandwidth_never_makes_the_best_slower(
    speeds: list[float], rate: float, factor: float, burst: float
) -> None:
    devices = [device(BERT, speed) for speed in speeds]
    slow, fast = (
        choose(question(cluster(devices, [link(each, burst_bytes=burst)] * len(devices)))).chosen
        for each in (rate, rate * factor)
    )
    assert fast.latency_s <= slow.latency_s * (1 + 1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_hopeless_links_leave_one_device(size: int) -> None:
    choice = choose(question(even_cluster(size, 1e4)))
    assert choice.chosen.plan == InferencePlan(strategy="single", devices=(0,), weights=(1.0,))
    assert choice.reason == "several devices are predicted to be no faster than one"


def test_fast_links_use_every_device() -> None:
    choice = choose(question(even_cluster(4, 1e9)))
    assert len(choice.chosen.plan.devices) == 4
    assert "times as fast as one device" in choice.reason


def test_a_gain_too_small_to_depend_on_others_for_leaves_one_device() -> None:
    """Between the rate at which two devices are no faster and the one at which they are 3 % faster."""
    rates = [1e6 * 1.02**step for step in range(300)]
    reasons = [choose(question(even_cluster(2, rate))).reason for rate in rates]
    assert [reason for number, reason in enumerate(reasons) if reason not in reasons[:number]][:2] == [
        "several devices are predicted to be no faster than one",
        "several devices would gain less than 3%",
    ]


@settings(max_examples=25)
@given(speeds=SPEEDS, rate=RATES)
def test_the_choice_is_the_best_of_every_even_plan(speeds: list[float], rate: float) -> None:
    """Brute force over what a person would try; balanced weights may only be better."""
    size = len(speeds)
    asked = question(cluster([device(BERT, speed) for speed in speeds], [link(rate)] * size), codecs=("fp32", "int8"))
    plans = [InferencePlan.even("single", 1)]
    for strategy in ("tensor", "sequence"):
        for mask in range(1, 1 << (size - 1)):
            ranks = (0, *(rank for rank in range(1, size) if mask >> (rank - 1) & 1))
            for codec in ("fp32", "int8"):
                for algorithm in ("two_step", "mesh"):
                    plans.append(
                        InferencePlan(
                            strategy=strategy,
                            devices=ranks,
                            weights=(1.0,) * len(ranks),
                            codec=codec,
                            algorithm=algorithm,
                        )
                    )
    best_s = min(predict(asked, plan).latency_s for plan in plans)
    assert choose(asked).chosen.latency_s <= best_s / 0.97 * (1 + 1e-9)


@pytest.mark.parametrize("strategy", ["tensor", "sequence"])
def test_uneven_devices_get_parts_in_proportion_to_their_speed(strategy: str) -> None:
    devices = [device(BERT, speed) for speed in (24e9, 8e9, 24e9)]
    asked = question(cluster(devices, [link(1e9)] * 3), strategies=(strategy,))
    candidates = [each for each in choose(asked).candidates if each.plan.devices == (0, 1, 2)]
    weights = candidates[0].plan.weights
    assert weights[0] == pytest.approx(weights[2]) and 2 < weights[0] / weights[1] < 4
    even = next(each for each in candidates if len(set(each.plan.weights)) == 1)
    assert candidates[0].latency_s < 0.75 * even.latency_s


@settings(max_examples=25)
@given(speeds=SPEEDS, rate=RATES, tokens=st.integers(1, 42), batch=st.integers(1, 3))
def test_no_prediction_is_below_its_bound(speeds: list[float], rate: float, tokens: int, batch: int) -> None:
    request = InferenceRequest(num_tokens=tokens, batch=batch)
    profile = cluster([device(LLAMA, speed) for speed in speeds], [link(rate)] * len(speeds))
    for candidate in weigh(question(profile, spec=LLAMA, request=request)):
        assert 0 < candidate.bound_s <= candidate.latency_s * (1 + 1e-9)
        assert 0 < candidate.compute_s <= candidate.latency_s * (1 + 1e-9)


def test_the_bound_is_arithmetic_a_hop_and_bytes() -> None:
    profile = even_cluster(4, 1e7)
    candidate = predict(question(profile), InferencePlan.even("sequence", 4))
    best_flops = 2 * 128 * BERT.mlp_numel / profile.devices[0].layers["fp32"][0].mlp.seconds[-1]
    flops = 12 * (2 * 32 * (BERT.attention_numel + BERT.mlp_numel) + 4 * 32 * 128 * 768)
    num_bytes = 12 * 3 * (2 * 32 * 768 * 4 + 16) + 3 * (24 + 16 + 2 * 8 * 128 + 16) + 3 * (768 * 4 + 16)
    assert candidate.bound_s == pytest.approx(flops / best_flops + 15 * 1e-4 + num_bytes / 1e7, rel=1e-3)


def test_a_burst_is_used_up_and_comes_back_while_computing() -> None:
    """What comes at once after a pause shortens each exchange by as much as was refilled, and the first by all."""
    plan = InferencePlan.even("sequence", 4)
    for burst in (0, 65536):
        profile = cluster([device(BERT, 24e9)] * 4, [link(1e7, burst_bytes=burst)] * 4)
        latency_s = predict(question(profile), plan).latency_s
        if burst == 0:
            without_s = latency_s
    assert without_s - latency_s == pytest.approx(12 * 65536 / 1e7, rel=0.05)


def test_a_pipeline_is_for_many_sequences() -> None:
    """On links on which nothing else pays."""
    one = replace(question(even_cluster(4, 1e6)), request=InferenceRequest(num_tokens=128))
    many = replace(one, request=InferenceRequest(num_tokens=128, batch=32))
    assert choose(one).chosen.plan.strategy == "single"
    found = {candidate.plan.strategy: candidate.latency_s for candidate in weigh(one)}
    assert (
        found["pipeline"] > found["single"] + 393_216 / 1e6
    )  # on its way once at least, and nothing goes on meanwhile
    chosen = choose(many).chosen
    assert chosen.plan.strategy == "pipeline"
    alone_s = next(candidate.latency_s for candidate in weigh(many) if candidate.plan.strategy == "single")
    assert 2 < alone_s / chosen.latency_s < 4


def test_memory_of_every_device_is_its_part_of_the_weights() -> None:
    plan = InferencePlan.even("tensor", 4)
    parts = [weight_bytes(BERT, share, "fp32", 12) for share in device_shares(plan, BERT)]
    assert sum(parts) == weight_bytes(BERT, LayerShare.whole(BERT), "fp32", 12) == 12 * 7077888 * 4
    candidate = predict(question(even_cluster(4, 1e8)), plan)
    assert all(0 < need - part < 32 * MIB for need, part in zip(candidate.memory_bytes, parts, strict=True))


def test_devices_that_share_a_processor_are_faster_alone() -> None:
    profile = even_cluster(2, 1e4)
    alone = replace(profile, devices=tuple(replace(each, alone_factor=0.8) for each in profile.devices))
    [slow, fast] = [predict(question(each), InferencePlan.even("single", 1)).latency_s for each in (profile, alone)]
    assert fast == pytest.approx(0.8 * slow)


def test_an_error_budget_allows_narrow_wires_and_weights() -> None:
    assert allowed(0.0) == (("fp32",), ("fp32",))
    assert allowed(0.002) == (("fp32", "bf16"), ("fp32",))
    assert allowed(0.05) == (("fp32", "bf16", "int8"), ("fp32", "bf16"))
    assert allowed(1.0) == (("fp32", "bf16", "int8", "int4"), ("fp32", "bf16", "int8"))


@pytest.mark.parametrize(
    ("plan", "num_exchanges"),
    [
        (InferencePlan.even("tensor", 3), 4 * 12),
        (replace(InferencePlan.even("tensor", 3), algorithm="mesh"), 2 * 12),
        (replace(InferencePlan.even("tensor", 3), algorithm="scatter"), 4 * 12),
        (InferencePlan.even("sequence", 3), 12),
        (InferencePlan.even("pipeline", 3), 2),
        (InferencePlan.even("single", 1), 0),
    ],
    ids=lambda value: value.way or value.strategy if isinstance(value, InferencePlan) else str(value),
)
def test_errors_of_all_exchanges_of_a_token_add_up_as_squares(plan: InferencePlan, num_exchanges: int) -> None:
    for codec in CODECS:
        error = expected_error(replace(plan, codec=codec), BERT, REQUEST)
        assert error == pytest.approx(WIRE_ERRORS[codec] * num_exchanges**0.5)


@pytest.mark.parametrize("max_error", [0.0, 1e-3, 0.01, 0.02, 0.03, 0.1, 1.0])
def test_every_plan_within_the_error_that_is_allowed_is_weighed_and_no_other(max_error: float) -> None:
    profile = even_cluster(3, 1e6)
    every = {candidate.plan for candidate in weigh(question(profile, codecs=CODECS))}
    within = {plan for plan in every if expected_error(plan, BERT, REQUEST) <= max_error}
    assert {each.plan for each in weigh(question(profile, codecs=CODECS, max_error=max_error))} == within
    assert len(within) < len(every) or max_error == 1.0


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("codec", CODECS)
def test_the_error_of_one_exchange_is_what_the_codec_makes_of_normally_distributed_values(
    codec: str, spread: float
) -> None:
    values = spread * torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    wire, decoded = create_codec(codec), torch.empty_like(values)
    encoded = torch.empty(wire.num_bytes(values.numel()), dtype=torch.uint8)
    wire.encode(values, encoded)
    wire.decode(encoded, decoded)
    assert float((decoded - values).norm() / values.norm()) == pytest.approx(WIRE_ERRORS[codec], rel=0.01)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(IsthmusError, match="strategies: got tensor for 1 devices, which leaves nothing"):
        choose(question(even_cluster(1, 1e6), strategies=("tensor",)))
    with pytest.raises(IsthmusError, match=r"dtype: bf16 was not measured on 2\.4e\+10, only fp32"):
        choose(question(even_cluster(1, 1e6), dtypes=("bf16",)))
    with pytest.raises(IsthmusError, match="tokens, batch: got 0, 1"):
        InferenceRequest(num_tokens=0)


def test_on_a_shared_medium_exchanges_take_all_that_is_sent_and_received() -> None:
    """On a medium as fast as each link N times what one link takes, both ways; on a fast one nothing more."""
    plan = InferencePlan.even("sequence", 4)
    latencies_s = []
    for airtime_s_per_byte in (0.0, 1 / 1e7, 1 / 1e10):
        shared = replace(link(1e7), airtime_s_per_byte=airtime_s_per_byte)
        candidate = predict(question(cluster([device(BERT, 24e9)] * 4, [shared] * 4)), plan)
        assert candidate.bound_s <= candidate.latency_s
        latencies_s.append(candidate.latency_s)
    sent_s = max(predict(question(even_cluster(4, 1e7)), plan).sent_bytes) / 1e7
    assert latencies_s[1] - latencies_s[0] == pytest.approx(7 * sent_s, rel=0.01)
    assert latencies_s[2] == latencies_s[0]


def test_repeated_sums_of_tokens_take_turns_on_a_shared_medium() -> None:
    request = InferenceRequest(num_tokens=8, num_new_tokens=2)
    seconds = []
    for airtime_s_per_byte in (0.0, 1e-6):
        shared = replace(link(1e9), airtime_s_per_byte=airtime_s_per_byte)
        profile = cluster([device(LLAMA, 24e9)] * 2, [shared] * 2)
        asked = question(profile, spec=LLAMA, request=request)
        candidate = predict(asked, InferencePlan.even("tensor", 2))
        seconds.append(candidate.latency_s - candidate.first_token_s)
    messages = 2 * LLAMA.num_layers * 2 * 2 * (4 * LLAMA.hidden_size + 16)
    assert seconds[1] - seconds[0] == pytest.approx(1e-6 * messages, rel=0.01)
