"""What decoupling would bring: what the decoupled model itself would be planned to take, had it been made."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planning.clusters import BERT, even_cluster

from isthmus.planning.device_costs import PROCESS_BYTES, DeviceCosts
from isthmus.planning.inference import GAIN, choose
from isthmus.planning.outlook import decoupled_forms, outlook
from isthmus.planning.plans import Question
from isthmus.planning.steps import Work
from isthmus.simulation.devices import kind
from isthmus.simulation.inference import question_of
from isthmus.simulation.profiles import cluster_profile
from isthmus.simulation.shapes import SHAPES
from isthmus.spec.inference import InferenceRequest
from isthmus.spec.transformer import TransformerSpec

GROUPED = replace(
    SHAPES["gpt2"], model_type="llama", num_kv_heads=3, intermediate_size=2048, has_gate=True, has_rotary=True
)
PI = kind("raspberry-pi-4b")


@pytest.mark.parametrize("num_devices", [2, 3, 4])
@pytest.mark.parametrize(
    ("spec", "request_"),
    [
        (SHAPES["bert-base"], InferenceRequest(num_tokens=128)),
        (SHAPES["gpt2"], InferenceRequest(num_tokens=16, batch=3)),
        (SHAPES["gpt2"], InferenceRequest(num_tokens=32, num_new_tokens=16)),
        (GROUPED, InferenceRequest(num_tokens=32, num_new_tokens=16)),
    ],
)
def test_it_is_what_the_decoupled_model_measured_by_itself_is_planned_to_take(
    spec: TransformerSpec, request_: InferenceRequest, num_devices: int
) -> None:
    """Sub-blocks of simulated devices are known without measuring, so derived ones can be compared with them."""
    devices = (replace(PI, bits_per_s=125e6),) * num_devices
    asked = question_of(spec, request_, devices, codecs=("int8",))
    assert not any(device.sub_block for device in asked.profile.devices)
    choice = choose(asked)
    found = outlook(asked, choice)
    assert found is not None and found.is_gain
    itself = question_of(found.spec, request_, devices, codecs=("int8",))
    assert all(device.sub_block for device in itself.profile.devices)
    chosen = choose(replace(itself, strategies=("block",))).chosen
    assert found.candidate.plan == chosen.plan
    assert found.candidate.latency_s == pytest.approx(chosen.latency_s, rel=1e-12)
    assert found.times_as_fast == choice.chosen.latency_s / found.candidate.latency_s


@pytest.mark.parametrize("heads", ["all", "own"])
@pytest.mark.parametrize("num", [2, 3, 12])
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_a_sub_block_that_was_not_measured_takes_what_one_that_was_would(heads: str, num: int, rows: int) -> None:
    spec = SHAPES["bert-base"].decoupled(num, (2, 5), heads=heads)
    profile = cluster_profile([PI], spec, ("fp32",))
    [device], [link] = profile.devices, profile.links
    known = DeviceCosts(profile=device, link=link, spec=spec, dtype="fp32")
    derived = replace(known, profile=replace(device, sub_block={}), _seconds={})
    for share in (1 / num, 1.0):
        work = Work(block_rows=rows, block_share=share)
        assert derived.work_s(work) == pytest.approx(known.work_s(work), rel=1e-12)


def test_forms_have_a_sub_block_for_each_device_or_two() -> None:
    def forms(num_devices: int, **changed: int) -> list[tuple[int, tuple[int, ...]]]:
        found = [form.decoupling for form in decoupled_forms(replace(BERT, **changed), num_devices)]
        return [(form.num_sub_blocks, form.original_layers) for form in found if form is not None]

    assert forms(4) == [(4, (2, 5, 8, 11)), (2, (2, 5, 8, 11))]
    assert forms(2) == [(2, (2, 5, 8, 11))]
    assert forms(5) == [(2, (2, 5, 8, 11))]
    assert forms(4, num_layers=2) == [(4, (1,)), (2, (1,))]
    assert forms(1) == forms(4, num_layers=1) == forms(2, hidden_size=33) == []
    assert decoupled_forms(BERT.decoupled(4, (2,)), 4) == []


def test_it_is_of_several_devices_even_where_one_is_faster() -> None:
    asked = Question(spec=BERT, request=InferenceRequest(num_tokens=128), profile=even_cluster(2, 1e4))
    choice = choose(asked)
    found = outlook(asked, choice)
    assert choice.chosen.plan.strategy == "single"
    assert found is not None and found.candidate.plan.strategy == "block" and not found.is_gain


def test_where_exchanges_cost_nothing_it_is_no_gain_to_compute_more() -> None:
    """Whole original layers, and scores of all heads in each sub-block, against tensor parallelism."""
    asked = Question(spec=BERT, request=InferenceRequest(num_tokens=128), profile=even_cluster(4, 1e12))
    found = outlook(asked, choose(asked))
    assert found is not None and not found.is_gain
    assert found.times_as_fast <= 1 / (1 - GAIN)


def test_where_no_decoupled_plan_fits_there_is_none() -> None:
    asked = Question(spec=BERT, request=InferenceRequest(num_tokens=128), profile=even_cluster(2, 1e8))
    choice = choose(asked)
    assert outlook(asked, choice) is not None
    assert outlook(replace(asked, memory_bytes=(PROCESS_BYTES + (20 << 20),) * 2), choice) is None
