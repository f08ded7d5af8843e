"""``isthmus bench infer`` and ``isthmus plan infer`` as a user types them: alone, and as one process per device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.two_processes import run_on_two
from tests.inference.conftest import checkpoint  # noqa: F401
from tests.inference.test_block_parallel import saved  # noqa: F401
from transformers import AutoModel, BertConfig
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.inference.session import Continuation
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.models.shards import ShardReader
from isthmus.planning.exchanges import broadcast
from isthmus.planning.workload import passes, workload
from isthmus.reporting.latency_table import latency_markdown
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.spec.report import BenchInferReport
from isthmus.spec.serialization import from_json, to_json

NAMES = ("pi-1", "pi-2")


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:  # noqa: F811
    return checkpoint("bert")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture(scope="module")
def copy(saved: Callable[[str, str], Path]) -> Path:  # noqa: F811
    """What might have been made of ``model``: 4 sub-blocks, the last layer original."""
    return saved("bert", "four")


def write_cluster(folder: Path) -> Path:
    path = folder / "cluster.json"
    devices = [{"name": name, "address": f"192.168.1.{number}"} for number, name in enumerate(NAMES, start=10)]
    path.write_text(json.dumps({"schema_version": 1, "devices": devices}))
    return path


def run_alone(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_bench_times_every_strategy_and_its_report_can_be_planned_with(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ("--codecs", "fp32,int8", "--tokens", "16", "--repeats", "2", "--report", str(path))
    (leader, _), (other, _) = run_on_two("bench", "infer", str(model), *options)
    assert other == ""
    report = from_json(BenchInferReport, path.read_text())
    assert json.loads(leader.splitlines()[-1])["rows"] == json.loads(path.read_text())["rows"]
    assert path.with_suffix(".md").read_text() == latency_markdown(report.rows)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kinds = {(row.strategy, row.codec, row.num_devices) for row in report.rows}
    assert kinds == {("single", "fp32", 1)} | {
        (strategy, codec, 2) for strategy in ("tensor", "sequence", "pipeline") for codec in ("fp32", "int8")
    }
    assert sum(row.is_choice for row in report.rows) == 1
    spec = ShardReader(model).spec
    for row in report.rows:
        assert row.latency_s.p10 <= row.latency_s.median <= row.latency_s.p90
        assert row.bound_s > 0 and row.predicted_latency_s > 0
        assert row.max_rel_error is not None and row.max_rel_error < (1e-5 if row.codec == "fp32" else 0.1)
        plan = InferencePlan(
            strategy=row.strategy,
            devices=tuple(range(row.num_devices)),
            weights=row.weights,
            codec=row.codec,
            algorithm="mesh" if row.algorithm == "mesh" else "two_step",
        )
        load = workload(plan, spec, InferenceRequest(num_tokens=16))
        assert (row.bytes_sent_per_device, row.num_exchanges) == (max(load.sent_bytes()), load.num_exchanges())

    printed = run_alone("plan", "infer", str(model), "--profile", str(path), "--tokens", "64")
    assert "→ " in printed and "sequence" in printed and "tensor" in printed and "single" in printed


def test_a_bench_of_generation_times_tokens_and_sends_what_was_predicted(
    checkpoint: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    path, llama, num_new = tmp_path / "report.json", checkpoint("llama"), 12
    options = ("--codecs", "fp32,int8", "--tokens", "16", "--new-tokens", str(num_new), "--repeats", "2")
    run_on_two("bench", "infer", str(llama), *options, "--report", str(path))
    rows = from_json(BenchInferReport, path.read_text()).rows
    assert {(row.strategy, row.codec) for row in rows} == {("single", "fp32"), ("tensor", "fp32"), ("tensor", "int8")}
    spec = ShardReader(llama).spec
    request = InferenceRequest(num_tokens=16, num_new_tokens=num_new)
    # How to generate is told too, beside what the planner counts.
    settings = broadcast(len(to_json(Continuation(settings=GenerationSettings(max_new_tokens=num_new)))), 2)[0]
    for row in rows:
        assert row.num_new_tokens == num_new
        first_s, token_s = row.time_to_first_token_s, row.time_per_token_s
        assert first_s is not None and token_s is not None
        assert first_s.median + token_s.p10 < row.latency_s.p90
        assert row.predicted_time_to_first_token_s is not None and row.predicted_time_per_token_s is not None
        later_s = (num_new - 1) * row.predicted_time_per_token_s
        assert row.predicted_time_to_first_token_s + later_s == pytest.approx(row.predicted_latency_s)
        assert row.max_rel_error is not None and row.max_rel_error < (1e-5 if row.codec == "fp32" else 0.1)
        if row.num_devices == 1:
            assert row.bytes_sent_per_device == row.num_exchanges == 0
            continue
        plan = InferencePlan(
            strategy=row.strategy,
            devices=(0, 1),
            weights=row.weights,
            codec=row.codec,
            algorithm="mesh" if row.algorithm == "mesh" else "two_step",
        )
        loads = passes(plan, spec, request)
        leader = sum(count * load.sent_bytes()[0] for load, count in loads) + settings.sent_bytes
        other = sum(count * load.sent_bytes()[1] for load, count in loads)
        assert row.bytes_sent_per_device == max(leader, other)
        assert row.num_exchanges == sum(count * load.num_exchanges() for load, count in loads) + 1


def test_a_bench_of_a_model_and_its_decoupled_copy_times_each_in_its_own_ways(
    model: Path, copy: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    options = ("--tokens", "16", "--repeats", "2", "--report", str(path))
    run_on_two("bench", "infer", str(model), "--decoupled", str(copy), *options)
    rows = from_json(BenchInferReport, path.read_text()).rows
    assert {(row.strategy, row.num_sub_blocks, row.num_devices) for row in rows} == {
        ("single", 1, 1),
        ("tensor", 1, 2),
        ("sequence", 1, 2),
        ("pipeline", 1, 2),
        ("single", 4, 1),
        ("block", 4, 2),
    }
    assert {row.algorithm for row in rows if row.strategy == "block"} == set(ORIGINAL_PLANS)
    assert sorted(row.num_sub_blocks for row in rows if row.is_choice) == [1, 4]
    specs = {1: ShardReader(model).spec, 4: ShardReader(copy).spec}
    for row in rows:
        assert row.max_rel_error is not None and row.max_rel_error < 1e-5
        is_block = row.strategy == "block"
        plan = InferencePlan(
            strategy=row.strategy,
            devices=tuple(range(row.num_devices)),
            weights=row.weights,
            algorithm="mesh" if row.algorithm == "mesh" else "two_step",
            originals=(row.algorithm,) if is_block else (),
        )
        load = workload(plan, specs[row.num_sub_blocks], InferenceRequest(num_tokens=16))
        assert (row.bytes_sent_per_device, row.num_exchanges) == (max(load.sent_bytes()), load.num_exchanges())
    assert latency_markdown(rows).count("| 4 | 2 |") + latency_markdown(rows).count("| **4** | **2** |") == 5
    for directory, way in ((model, "tensor"), (copy, "block")):
        assert way in run_alone("plan", "infer", str(directory), "--profile", str(path), "--tokens", "16")


def test_what_was_measured_of_a_cluster_is_known_afterwards_anywhere(model: Path, tmp_path: Path) -> None:
    cluster, plan = write_cluster(tmp_path), tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", "infer", str(model), "--cluster", str(cluster)])
    assert "nothing was measured yet of pi-1, pi-2 with this model" in result.stderr and result.exit_code == 2
    options = ("plan", "infer", str(model), "--cluster", str(cluster), "--tokens", "16")
    (leader, _), (other, _) = run_on_two(*options)
    assert "measuring the devices" in leader and other == ""
    printed = run_alone(*options, "--output", str(plan))
    assert "measuring" not in printed and "on pi-1" in printed
    assert from_json(InferencePlan, plan.read_text()).devices[0] == 0
    assert "→ single on pi-2" in run_alone(*options, "--devices", "pi-2")


def test_one_device_measures_itself(model: Path) -> None:
    assert "→ single" in run_alone("plan", "infer", str(model), "--tokens", "8", "--codec", "auto", "--dtype", "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "infer", "MODEL", "--strategies", "magic"], "strategies: got magic, wanted all or some of single"),
        (["bench", "infer", "MODEL", "--codecs", ","], "codecs: got none, wanted all or some of fp32"),
        (["bench", "infer", "MODEL", "--tokens", "9999"], "tokens: got 9999, wanted at most the 512"),
        (["plan", "infer", "MODEL", "--tokens", "9999"], "tokens: got 9999, wanted at most the 512"),
        (["plan", "infer", "MODEL", "--new-tokens", "9"], "'bert' is an encoder"),
        (
            ["bench", "infer", "MODEL", "--decoupled", "MODEL"],
            "has no sub-blocks, wanted what `isthmus decouple` makes",
        ),
        (
            ["bench", "infer", "COPY", "--decoupled", "COPY"],
            "model: got COPY, which has 4 sub-blocks, beside a decoupled",
        ),
        (
            ["bench", "infer", "MODEL", "--decoupled", "OTHER"],
            "decoupled: got OTHER with num_layers 2, hidden_size 48, head_size 12, vocab_size 60, wanted num_layers 3, "
            "hidden_size 32, head_size 8, vocab_size 99, as MODEL has",
        ),
        (["bench", "infer", "MODEL", "--new-tokens", "4"], "model: 'bert' is an encoder; wanted a decoder"),
        (["bench", "infer", "LLAMA", "--tokens", "250", "--new-tokens", "9"], "max_new_tokens: got 9 after a prompt"),
        (
            ["bench", "infer", "LLAMA", "--strategies", "sequence", "--new-tokens", "4"],
            "strategies: got sequence, wanted single or tensor",
        ),
        (["plan", "infer", "MODEL", "--codec", "zip"], "codec: got 'zip', wanted auto or one of fp32"),
        (["plan", "infer", "MODEL", "--devices", "pi-1"], "devices: got names without a cluster"),
        (["plan", "infer", "MODEL", "--cluster", "/nowhere"], "cluster: cannot read /nowhere"),
        (["plan", "infer", "MODEL", "--profile", "/nowhere"], "profile: cannot read /nowhere"),
        (["plan", "infer", "MODEL", "--profile", "CONFIG"], "config.json holds none"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    model: Path,
    copy: Path,
    checkpoint: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    words = {"MODEL": str(model), "LLAMA": str(checkpoint("llama")), "CONFIG": str(model / "config.json")}
    words |= {"COPY": str(copy), "OTHER": str(tmp_path / "other")}
    if "OTHER" in arguments:
        shape: dict[str, Any] = dict(
            vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        config = decoupled_config(BertConfig(**shape), {"num_sub_blocks": 4, "original_layers": [1]})
        AutoModel.from_config(config).save_pretrained(words["OTHER"])
    result = CliRunner().invoke(app, [words.get(part, part) for part in arguments])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    for name, word in words.items():
        said = said.replace(word, name)
    assert message in said
