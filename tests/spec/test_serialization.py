"""isthmus.spec.serialization: written values read back equal, one value has one text, bad text is refused by name."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.spec.cluster import (
    Cluster,
    ClusterDevice,
    ClusterProfile,
    CodecTimes,
    DeviceProfile,
    LinkProfile,
    Overlapping,
    Transfer,
    Waiting,
    WidthTimes,
)
from isthmus.spec.hardware import Hardware, LinkRate
from isthmus.spec.inference import InferencePlan
from isthmus.spec.model import ExpertSpec, ModelSpec, TensorSpec
from isthmus.spec.plan import Plan, Stage
from isthmus.spec.profile import Curve, ExpertTimes, Profile, Slowdown
from isthmus.spec.report import (
    BenchInferReport,
    BenchInferRow,
    BenchTuneReport,
    BenchTuneRow,
    PlanInferReport,
    PredictedDecoupling,
    PredictedPlan,
    Spread,
    StepRecord,
    TuneReport,
    TuneSummary,
)
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.simulated import (
    DeviceEntry,
    OwnFigure,
    PublishedFigure,
    PublishedReport,
    SimulatedCell,
    SimulatedCluster,
    SimulatedDevice,
    SimulateInferReport,
)
from isthmus.spec.timeline import Span, Timeline

GOLDEN = Path(__file__).parent / "golden"

_CURVE = Curve(num_tokens=(1, 2, 4), seconds=(1e-4, 1.5e-4, 0.1 + 0.2))
_GATE_UP = TensorSpec(name="gate_up_proj", shape=(8, 6))
_EXPERT = ExpertSpec(
    hidden_size=6,
    intermediate_size=4,
    num_experts=2,
    top_k=1,
    has_gate=True,
    has_bias=False,
    is_transposed=False,
    activation="silu_glu",
    tensors=(_GATE_UP, TensorSpec(name="down_proj", shape=(6, 4))),
)
_SIMULATED_DEVICE = SimulatedDevice(
    name="pi",
    flops_per_s={"fp32": 2.5e10},
    memory_bytes_per_s=5e9,
    memory_bytes=2**32,
    bits_per_s=1.25e8,
    round_trip_s=2e-4,
    is_wireless=True,
)
EXAMPLES: dict[str, Any] = {
    "profile": Profile(
        hardware=Hardware(
            cpu_name="A CPU · 2 cores",
            num_cpu_threads=2,
            host_memory_bytes=2**34,
            accelerator="emulated",
            accelerator_name="emulated",
            accelerator_memory_bytes=2**33,
            link=LinkRate(h2d_bytes_per_s=2e9, d2h_bytes_per_s=2e9, latency_s=2e-5),
        ),
        dtype="fp32",
        experts={
            "h6-i4-glu": ExpertTimes(
                cpu_forward=_CURVE,
                cpu_backward=_CURVE,
                accelerator_forward=_CURVE,
                accelerator_backward=_CURVE,
                routing_forward=_CURVE,
            )
        },
        h2d_s_per_byte=5e-10,
        d2h_s_per_byte=5e-10,
        h2d_duplex_s_per_byte=6e-10,
        d2h_duplex_s_per_byte=6e-10,
        copy_latency_s=2e-5,
        copy_window=3,
        optimizer_s_per_parameter=2.7e-10,
        dense_forward_s_per_token=1e-6,
        dense_backward_s_per_token=2e-6,
        outer_forward_s_per_token=1e-7,
        outer_backward_s_per_token=2e-7,
        norm_s_per_parameter=1e-10,
        dense_slowdown=Slowdown(alone=1.125, beside=1.25),
        copy_core_s_per_byte=1e-10,
        measured_at="2026-01-01T00:00:00Z",
        notes={"why": "golden"},
    ),
    "plan": Plan(
        policy="affinity",
        stages=(Stage(first_layer=0, last_layer=3), Stage(first_layer=4, last_layer=7)),
        num_slots=12,
        slot_bytes=4096,
        dense_bytes=2**20,
        activation_bytes=2**16,
        copy_window=3,
        num_waves=2,
        num_in_flight=4,
    ),
    "timeline": Timeline(
        spans=(
            Span(lane="h2d", name="L0.E1", start_s=0.0, end_s=0.25, kind="load_expert", num_bytes=4096),
            Span(lane="accelerator", name="L0", start_s=0.25, end_s=0.5, kind="expert_forward", num_tokens=7),
        ),
        steps=((0, 0.0, 0.5),),
    ),
    "model": ModelSpec(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        is_encoder_decoder=False,
        num_layers=2,
        hidden_size=6,
        vocab_size=32,
        layers=(None, _EXPERT),
        dense_numel=(10, 20),
        outer_numel=384,
    ),
    "tune_report": TuneReport(
        config={"model": "tiny", "steps": 1, "eval_data": None, "columns": ["question", "answer"]},
        environment={"torch": "2.13.0", "num_cpu_threads": 2},
        steps=(
            StepRecord(
                step=1,
                loss=10.5,
                num_tokens=2048,
                duration_s=0.5,
                bound_s=0.375,
                h2d_bytes=1024,
                d2h_bytes=512,
                num_experts_on_cpu=3,
                num_experts_on_accelerator=5,
                optimizer_s=0.125,
                learning_rate=1e-5,
                gradient_norm=1.5,
                evaluation_loss=10.25,
            ),
        ),
        summary=TuneSummary(
            tokens_per_s=4096.0,
            bound_share=0.75,
            peak_accelerator_bytes=2**20,
            accelerator_budget_bytes=2**21,
            peak_host_bytes=2**30,
            needed_host_bytes=2**29,
            predictor_token_accuracy=0.85,
            predictor_least_popular_quarter_accuracy=1.0,
            micro_batches_in_flight=2,
        ),
    ),
    "cluster": Cluster(
        devices=(
            ClusterDevice(name="pi-1", address="192.168.1.10"),
            ClusterDevice(name="pi-2", address="192.168.1.11", memory_bytes=2**31),
        ),
        leader="pi-2",
    ),
    "cluster_profile": ClusterProfile(
        transport="socket",
        model="bert",
        devices=(
            DeviceProfile(
                name="pi-1",
                cpu_name="A CPU",
                num_threads=1,
                free_memory_bytes=2**30,
                memory_bytes_per_s=5e9,
                layers={"fp32": (WidthTimes(share=0.5, attention=_CURVE, mlp=_CURVE),)},
                embedding=_CURVE,
                s_per_score=1e-9,
                codecs={"int8": CodecTimes(encode_s=4e-9, decode_s=1e-9)},
                s_per_added_value=4e-10,
                alone_factor=0.875,
            ),
        ),
        links=(
            LinkProfile(
                round_trip_s=1e-4,
                latency_s=5e-5,
                message_s=2e-4,
                waiting=Waiting(computing_s=(1e-3, 1e-2), seconds=(2e-4, 1e-3)),
                sum_step_s=3e-4,
                transfer=Transfer(num_bytes=(16384, 32768), seconds=(0.0, 0.001)),
                bytes_per_s=1.5e7,
                burst_bytes=65536.0,
                overlapping=Overlapping(starting_s=1e-4, s_per_byte=2.5e-9),
                airtime_s_per_byte=2.5e-8,
            ),
        ),
        measured_at="2026-01-01T00:00:00Z",
        notes={"why": "golden"},
    ),
    "bench_infer_report": BenchInferReport(
        config={"strategies": ["sequence"], "tokens": 128},
        environment={"torch": "2.13.0"},
        rows=(
            BenchInferRow(
                strategy="sequence",
                codec="int8",
                dtype="fp32",
                num_devices=2,
                tokens=128,
                latency_s=Spread(median=0.5, p10=0.25, p90=0.75),
                predicted_latency_s=0.5,
                bound_s=0.375,
                bytes_sent_per_device=1024,
                num_exchanges=15,
                max_rel_error=0.001,
                weights=(1.0, 2.0),
                is_choice=True,
            ),
            BenchInferRow(
                strategy="block",
                codec="fp32",
                dtype="fp32",
                num_devices=2,
                tokens=128,
                latency_s=Spread(median=0.25, p10=0.125, p90=0.5),
                predicted_latency_s=0.25,
                bound_s=0.125,
                bytes_sent_per_device=512,
                num_exchanges=3,
                algorithm="gather+tokens",
                weights=(1.0, 1.0),
                num_sub_blocks=4,
            ),
            BenchInferRow(
                strategy="tensor",
                codec="fp32",
                dtype="int8",
                num_devices=2,
                tokens=64,
                latency_s=Spread(median=1.5, p10=1.25, p90=1.75),
                predicted_latency_s=1.25,
                bound_s=0.75,
                bytes_sent_per_device=4096,
                num_exchanges=99,
                algorithm="two_step",
                weights=(1.0, 1.0),
                num_new_tokens=32,
                time_to_first_token_s=Spread(median=0.25, p10=0.125, p90=0.375),
                time_per_token_s=Spread(median=0.0625, p10=0.03125, p90=0.125),
                predicted_time_to_first_token_s=0.5,
                predicted_time_per_token_s=0.03125,
            ),
        ),
    ),
    "plan_infer_report": PlanInferReport(
        config={"model": "./bert", "tokens": 128},
        environment={"torch": "2.13.0"},
        chosen=PredictedPlan(
            plan=InferencePlan.even("tensor", 2, codec="int8"),
            latency_s=0.75,
            first_token_s=0.75,
            bound_s=0.5,
            bytes_sent_per_device=8192,
            num_exchanges=51,
            memory_bytes_per_device=2**28,
        ),
        reason="the fastest that fits",
        decoupled=PredictedDecoupling(
            num_sub_blocks=2,
            original_layers=(2, 5),
            predicted=PredictedPlan(
                plan=dataclasses.replace(InferencePlan.even("block", 2, codec="int8"), originals=("gather", "tokens")),
                latency_s=0.5,
                first_token_s=0.5,
                bound_s=0.375,
                bytes_sent_per_device=1024,
                num_exchanges=5,
                memory_bytes_per_device=2**28,
            ),
            times_as_fast=1.5,
        ),
    ),
    "simulated_cluster": SimulatedCluster(
        devices=(
            DeviceEntry(name="pi", kind="raspberry-pi-4b", count=2, bits_per_s=1e8),
            DeviceEntry(
                name="laptop",
                flops_per_s={"fp32": 1e11, "int8": 2e11},
                memory_bytes_per_s=2e10,
                memory_bytes=2**33,
                bits_per_s=3e8,
                round_trip_s=0.003,
                operator_s=1e-5,
                is_wireless=True,
            ),
        )
    ),
    "simulate_infer_report": SimulateInferReport(
        config={"model": "bert-base", "bandwidths": [125.0]},
        devices=(_SIMULATED_DEVICE,),
        cells=(
            SimulatedCell(
                bits_per_s=1.25e8,
                rows=(
                    BenchInferRow(
                        strategy="single",
                        codec="fp32",
                        dtype="fp32",
                        num_devices=1,
                        tokens=128,
                        latency_s=Spread(median=1.0, p10=1.0, p90=1.0),
                        predicted_latency_s=1.0,
                        bound_s=0.75,
                        bytes_sent_per_device=0,
                        num_exchanges=0,
                        transport="simulated",
                    ),
                ),
            ),
        ),
    ),
    "published_report": PublishedReport(
        device=_SIMULATED_DEVICE,
        figures=(PublishedFigure(model="bert-base", bits_per_s=1.25e8, strategy="TP", published=1.5, simulated=1.75),),
        ours=(
            OwnFigure(
                model="bert-base",
                bits_per_s=1.25e8,
                codec="int8",
                plan="block tokens",
                latency_s=0.375,
                one_device_s=1.0,
            ),
        ),
    ),
    "bench_tune_report": BenchTuneReport(
        config={"policies": ["affinity", "mobius"]},
        environment={"torch": "2.13.0"},
        rows=(
            BenchTuneRow(
                policy="affinity",
                skew="uniform",
                measured_skew=0.0625,
                cpu_speed=1.0,
                tokens_per_s=Spread(median=100.0, p10=90.0, p90=110.0),
                bound_share=0.75,
                h2d_bytes_per_step=1024.0,
                share_of_tokens_on_cpu=0.25,
            ),
            BenchTuneRow(
                policy="mobius",
                skew=0.4,
                measured_skew=0.4,
                cpu_speed=0.25,
                tokens_per_s=Spread(median=50.0, p10=45.0, p90=55.0),
                bound_share=0.5,
                h2d_bytes_per_step=4096.0,
                share_of_tokens_on_cpu=0.0,
            ),
        ),
    ),
}


def _values_of(declared: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared type, every field of a dataclass drawn (also those with defaults)."""
    if dataclasses.is_dataclass(declared):
        hints = typing.get_type_hints(declared)
        return st.builds(
            typing.cast(Any, declared),
            **{name: st.just(1) if name == "schema_version" else _values_of(hint) for name, hint in hints.items()},
        )
    arguments = typing.get_args(declared)
    if typing.get_origin(declared) is tuple and arguments[-1] is Ellipsis:
        return st.lists(_values_of(arguments[0]), max_size=3).map(tuple)
    if typing.get_origin(declared) is tuple:
        return st.tuples(*map(_values_of, arguments))
    if typing.get_origin(declared) is dict:
        return st.dictionaries(st.text(max_size=4), _values_of(arguments[1]), max_size=3)
    if arguments:
        return st.one_of(*map(_values_of, arguments))
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=4),
        type(None): st.none(),
    }
    return scalars[declared]


@pytest.mark.parametrize("cls", [Profile, Plan, Timeline, ModelSpec, DeviceProfile, LinkProfile, DeviceEntry])
@settings(max_examples=40)
@given(data=st.data())
def test_round_trip_gives_back_an_equal_value(cls: type[Any], data: st.DataObject) -> None:
    value = data.draw(_values_of(cls))
    text = to_json(value)
    assert from_json(cls, text) == value
    assert to_json(from_json(cls, text)) == text


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_file_is_what_is_written_and_reads_back(name: str) -> None:
    text = (GOLDEN / f"{name}.json").read_text()
    assert to_json(EXAMPLES[name]) == text
    assert from_json(type(EXAMPLES[name]), text) == EXAMPLES[name]


def test_one_value_has_one_text() -> None:
    timeline = EXAMPLES["timeline"]
    plain = json.loads(to_json(timeline))
    other_order = json.dumps(dict(reversed(plain.items())))
    assert to_json(from_json(Timeline, other_order)) == to_json(timeline)
    whole_seconds = Span(lane="h2d", name="x", start_s=0, end_s=1)
    assert to_json(whole_seconds) == to_json(dataclasses.replace(whole_seconds, start_s=0.0, end_s=1.0))


def test_fields_with_a_default_may_be_missing() -> None:
    text = '{"schema_version": 1, "spans": [{"lane": "h2d", "name": "x", "start_s": 0, "end_s": 1}]}'
    assert from_json(Timeline, text) == Timeline(spans=(Span(lane="h2d", name="x", start_s=0.0, end_s=1.0),))


def test_rows_from_before_there_were_decoupled_models_are_of_models_that_are_not() -> None:
    report = json.loads((GOLDEN / "bench_infer_report.json").read_text())
    assert report["rows"][1].pop("num_sub_blocks") == 4
    assert from_json(BenchInferReport, json.dumps(report)).rows[1].num_sub_blocks == 1


_PLAN = json.loads((GOLDEN / "plan.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"Plan\.schema_version: got 2, wanted 1: the file was written by another version"),
        ({"schema_version": True}, r"Plan\.schema_version: got True, wanted 1"),
        ({"schema_version": None}, r"Plan\.schema_version: got None, wanted 1"),
        ({"schema_version": 2, "stage_list": []}, r"schema_version: got 2"),
        ({"stage_list": [], "alpha": 1}, r"Plan: unknown fields alpha, stage_list; wanted only activation_bytes, "),
        ({"num_slots": "12"}, r"Plan\.num_slots: got '12' \(str\), wanted int"),
        ({"num_slots": 1.5}, r"Plan\.num_slots: got 1\.5 \(float\), wanted int"),
        ({"num_slots": True}, r"Plan\.num_slots: got True \(bool\), wanted int"),
        ({"policy": None}, r"Plan\.policy: got None \(NoneType\), wanted str"),
        ({"is_dense_resident": 1}, r"Plan\.is_dense_resident: got 1 \(int\), wanted bool"),
        ({"stages": {}}, r"Plan\.stages: got \{\} \(dict\), wanted tuple\[isthmus\.spec\.plan\.Stage, \.\.\.\]"),
        ({"stages": [{"first_layer": 0}]}, r"Plan\.stages\[0\]: missing fields last_layer"),
        ({"stages": [3]}, r"Plan\.stages\[0\]: got 3 \(int\), wanted Stage"),
    ],
)
def test_bad_content_is_refused_by_place(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Plan, json.dumps(_PLAN | change))


@pytest.mark.parametrize("field", ["policy", "stages", "num_waves"])
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=rf"Plan: missing fields {field}"):
        from_json(Plan, json.dumps({name: value for name, value in _PLAN.items() if name != field}))


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        (Plan, '{"schema_version": 1, "pol', r"Plan: the text is not JSON \(.*\): was the file cut short\?"),
        (Plan, "[]", r"Plan: got \[\] \(list\), wanted Plan"),
        (Timeline, '{"schema_version": 1, "spans": [], "steps": [[0, 1.0]]}', r"steps\[0\]: got 2 elements, wanted 3"),
        (Span, '{"lane": "h2d", "name": "x", "start_s": NaN, "end_s": 1}', r"Span\.start_s: got nan, wanted a finite"),
        (TuneReport, (GOLDEN / "bench_tune_report.json").read_text(), r"TuneReport: unknown fields rows"),
    ],
)
def test_bad_text_is_refused_by_place(cls: type[Any], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(cls, text)


def test_none_is_refused_where_it_is_no_alternative() -> None:
    text = (GOLDEN / "bench_tune_report.json").read_text().replace('"skew": "uniform"', '"skew": null')
    with pytest.raises(ValueError, match=r"rows\[0\]\.skew: got None \(NoneType\), wanted str \| float"):
        from_json(BenchTuneReport, text)


def test_report_of_another_kind_is_refused() -> None:
    text = (GOLDEN / "tune_report.json").read_text().replace('"kind": "tune"', '"kind": "bench-tune"')
    with pytest.raises(
        ValueError, match=r"TuneReport\.kind: got 'bench-tune' \(str\), wanted typing\.Literal\['tune'\]"
    ):
        from_json(TuneReport, text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, True])
def test_value_of_another_type_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Span\.end_s: got "):
        to_json(Span(lane="h2d", name="x", start_s=0.0, end_s=value))


@pytest.mark.parametrize("value", [{"path": Path("x")}, {"set": {1}}, {"deep": [{1: 2}]}, {"inf": float("inf")}])
def test_only_plain_values_are_written_where_any_is_allowed(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"TuneReport\.config\['\w+'\]"):
        to_json(dataclasses.replace(EXAMPLES["tune_report"], config=value))


@pytest.mark.parametrize("value", [3, {"a": 1}, Plan])
def test_only_dataclasses_are_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"to_json: got \w+, wanted an instance of a dataclass"):
        to_json(value)
