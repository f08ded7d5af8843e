"""From a device's few figures to a profile: seconds are those of operations, bytes and messages, none left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.planning.curves import evaluate
from isthmus.planning.device_costs import PROCESS_BYTES
from isthmus.planning.inference import predict, weigh
from isthmus.simulation.devices import KINDS, kind
from isthmus.simulation.inference import question_of
from isthmus.simulation.profiles import SOCKETS, SYSTEM_BYTES, cluster_profile
from isthmus.simulation.shapes import SHAPES, decoupled
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest

BERT = SHAPES["bert-base"]
GPT2 = SHAPES["gpt2"]
PI = kind("raspberry-pi-4b")
BARE = replace(PI, operator_s=0.0)
REQUEST = InferenceRequest(num_tokens=128)


def test_many_rows_take_their_operations_and_one_row_its_weights() -> None:
    endless = replace(BARE, memory_bytes_per_s=1e15)
    [measured] = cluster_profile([endless], BERT, ["fp32"]).devices
    for width in measured.layers["fp32"]:
        seconds = float(evaluate(width.mlp, 256))
        assert seconds == pytest.approx(2 * 256 * width.share * BERT.mlp_numel / PI.flops_per_s["fp32"], rel=1e-3)
    endless = replace(BARE, flops_per_s={"fp32": 1e18, "int8": 1e18})
    [measured] = cluster_profile([endless], BERT, ["fp32", "int8"]).devices
    for dtype, num_bytes in (("fp32", 4), ("int8", 1)):
        reading_s = num_bytes * BERT.attention_numel / PI.memory_bytes_per_s
        assert measured.layers[dtype][0].attention.seconds[0] == pytest.approx(reading_s, rel=0.04)


def test_operators_are_counted_once_a_block_and_fewer_for_a_decoders_token() -> None:
    for spec, rows, wanted in ((BERT, 1, 12), (GPT2, 1, 2), (GPT2, 8, 12)):
        seconds = []
        for operator_s in (0.0, 1.0):
            [measured] = cluster_profile([replace(PI, operator_s=operator_s)], spec, ["fp32"]).devices
            width = measured.layers["fp32"][0]
            seconds.append(float(evaluate(width.attention, rows) + evaluate(width.mlp, rows)))
        assert seconds[1] - seconds[0] == pytest.approx(wanted)


def test_sub_blocks_have_their_part_of_the_matrices_and_own_heads_of_attention_again() -> None:
    endless = replace(BARE, memory_bytes_per_s=1e15)
    for heads, parts in (("all", 4), ("own", 16)):
        [measured] = cluster_profile([endless], decoupled(BERT, 4, 4, heads), ["fp32"]).devices
        times, rate = measured.sub_block["fp32"], PI.flops_per_s["fp32"]
        assert times.share == 0.25
        assert float(evaluate(times.attention, 128)) == pytest.approx(
            256 * BERT.attention_numel / parts / rate, rel=1e-3
        )
        assert float(evaluate(times.mlp, 128)) == pytest.approx(256 * BERT.mlp_numel / 4 / rate, rel=1e-3)


def test_memory_for_weights_is_what_system_and_process_leave() -> None:
    [measured] = cluster_profile([PI], BERT, ["fp32"]).devices
    assert measured.free_memory_bytes == (4 << 30) - SYSTEM_BYTES - PROCESS_BYTES
    [tiny] = cluster_profile([replace(PI, memory_bytes=1 << 20)], BERT, ["fp32"]).devices
    assert tiny.free_memory_bytes == 0


def test_a_cable_carries_payload_at_its_share_and_both_ways_at_once() -> None:
    measured = cluster_profile([PI] * 4, BERT, ["fp32"]).links[0]
    assert measured.bytes_per_s == 1e9 / 8 * SOCKETS.link_share and measured.airtime_s_per_byte == 0
    assert measured.latency_s == pytest.approx(PI.round_trip_s / 2 + SOCKETS.exchange_s)


def test_all_devices_on_wifi_take_turns_and_every_byte_passes_the_air_twice() -> None:
    """An all-gather of N devices: N · (N − 1) messages, up to the access point and down again."""
    plan = InferencePlan.even("sequence", 4)
    seconds = {}
    for is_wireless in (False, True):
        one = replace(kind("laptop-wifi5"), is_wireless=is_wireless, bits_per_s=1e6)
        # A cable of the same payload.
        one = one if is_wireless else replace(one, bits_per_s=1e6 / SOCKETS.link_share)
        seconds[is_wireless] = predict(question_of(BERT, REQUEST, [one] * 4), plan).latency_s
    assert seconds[True] == pytest.approx(8 * seconds[False], rel=0.02)


def test_a_wireless_device_among_wired_ones_takes_only_its_own_turns() -> None:
    wired, wireless = replace(PI, bits_per_s=1e9), replace(kind("laptop-wifi5"), bits_per_s=1e6, name="w")
    plan = InferencePlan.even("sequence", 2)
    both, one = (
        predict(question_of(BERT, REQUEST, devices), plan).latency_s
        for devices in ([wireless, wireless], [wired, wireless])
    )
    assert both == pytest.approx(2 * one, rel=0.05)


def test_a_dtype_that_a_device_does_not_have_is_refused() -> None:
    with pytest.raises(IsthmusError, match="dtype: raspberry-pi-4b has no bf16, wanted one of fp32, int8"):
        cluster_profile([PI], BERT, ["bf16"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("new_tokens", [0, 8])
@pytest.mark.parametrize("heads", ["all", "own"])
def test_nothing_is_simulated_to_be_faster_than_its_bound(name: str, new_tokens: int, heads: str) -> None:
    request = InferenceRequest(num_tokens=64, num_new_tokens=new_tokens)
    for spec in (GPT2, decoupled(GPT2, 4, 4, heads)):
        for bits_per_s in (kind(name).bits_per_s, 1e7):
            devices = [replace(kind(name), bits_per_s=bits_per_s)] * 3
            for candidate in weigh(question_of(spec, request, devices, codecs=("fp32", "int8"))):
                assert 0 < candidate.bound_s <= candidate.latency_s * (1 + 1e-9), candidate.plan
