"""``isthmus simulate tune`` as a user types it: a shape or a checkpoint, a named cluster or a file, drawn or recorded
popularity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.models.config import load_config, model_spec
from isthmus.models.tiny import tiny_config
from isthmus.planning.popularity_trace import PopularityTrace, model_identity, write_trace
from isthmus.reporting.chrome_trace import read_chrome_trace
from isthmus.simulation.tuning.clusters import a800
from isthmus.simulation.tuning.run import POLICIES
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.simulated_tune import SimulateTuneReport

SMALL = ("--model", "S-8", "--cluster", "a800-c1g2", "--batch", "8", "--seq-len", "16")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", "tune", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", "tune", *arguments])
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


def test_every_policy_is_printed_and_written(tmp_path: Path) -> None:
    path = tmp_path / "out" / "tune.json"
    asked = (*SMALL, "--num-devices", "2", "--popularity", "gini=0.4")
    printed = run(*asked, "--report", str(path))
    report = from_json(SimulateTuneReport, path.read_text())
    assert [row.policy for row in report.rows] == list(POLICIES)
    assert all(row.policy in printed for row in report.rows)
    rows = {row.policy: row for row in report.rows}
    seconds = {name: row.step_s.median for name, row in rows.items() if row.step_s}
    assert seconds["affinity"] <= min(seconds["mobius"], seconds["aptmoe"]) * (1 + 1e-9)
    assert rows["mobius"].cpu_pairs_share == rows["gpipe"].cpu_experts_share == 0
    assert report.skewness == pytest.approx(0.4, abs=0.01) and report.cluster == a800(2, 2)
    table = path.with_suffix(".md").read_text()
    assert table.startswith("# S-8, 2 accelerators of a800-c1g2") and table.count("\n| ") == 1 + len(POLICIES)
    assert run(*asked) == printed


def test_policies_may_have_the_names_that_runs_have() -> None:
    printed = run(*SMALL, "--policies", "resident,paper,gpipe")
    assert [word for line in printed.splitlines() for word in line.split()[:1] if word in POLICIES] == [
        "gpipe",
        "aptmoe",
    ]


def test_the_table_is_whole_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = run(*SMALL)
    assert "…" not in printed and "Adam" in printed and "loaded" in printed


def test_what_does_not_fit_is_a_row_that_says_so() -> None:
    printed = run("--model", "L-8", "--cluster", "a800-c1g1", "--policies", "gpipe,mobius", "--batch", "4")
    assert "gpipe: does not fit: " in printed and "GiB are missing on an accelerator" in printed


def test_timelines_are_written_for_every_device(tmp_path: Path) -> None:
    run(*SMALL, "--policies", "aptmoe", "--num-devices", "2", "--steps", "1", "--timeline", str(tmp_path / "t.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t-aptmoe.json", "t-aptmoe.png"]
    devices = read_chrome_trace(tmp_path / "t-aptmoe.json")
    assert len(devices) == 2
    for timeline in devices:
        assert {span.lane for span in timeline.spans} >= {"accelerator", "h2d", "d2h", "optimizer"}
        assert len(timeline.steps) == 1


def test_a_picture_names_the_stages_that_its_policy_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def draw(timelines: object, stages: Sequence[object], path: Path, *, title: str) -> None:
        drawn[title.partition(":")[0]] = len(stages), title

    monkeypatch.setattr("isthmus.reporting.devices_plot.write_timelines", draw)
    run(
        "--model",
        "M-8",
        "--cluster",
        "a800-c1g4",
        "--policies",
        "aptmoe,affinity",
        "--timeline",
        str(tmp_path / "t.json"),
    )
    assert drawn["aptmoe"][0] == 8 < drawn["affinity"][0]
    for num_stages, title in drawn.values():
        assert f", {num_stages} stages, " in title


def test_a_checkpoint_a_file_and_a_trace(tmp_path: Path) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path / "model")
    spec = model_spec(load_config(tmp_path / "model"))
    num_experts = tuple(layer.num_experts for layer in spec.layers if layer is not None)
    counts = np.ones((2, len(num_experts), max(num_experts)), np.int64)
    counts[:, :, 0] = 9
    top_k = tuple(layer.top_k for layer in spec.layers if layer is not None)
    trace = PopularityTrace(model=model_identity(spec), num_experts=num_experts, top_k=top_k, counts=counts)
    write_trace(trace, tmp_path / "trace.npz")
    (tmp_path / "cluster.json").write_text(to_json(a800(1, 1)))
    asked = ("--cluster", str(tmp_path / "cluster.json"), "--model", str(tmp_path / "model"), "--batch", "2")
    assert "mobius" in run(*asked, "--popularity", str(tmp_path / "trace.npz"), "--policies", "mobius,aptmoe")
    write_trace(replace(trace, model="Other"), tmp_path / "trace.npz")
    assert "popularity: the trace is of another model" in refused(*asked, "--popularity", str(tmp_path / "trace.npz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--model", "S-9"), "model: got 'S-9', wanted a directory with a config.json or one of S-8, S-16"),
        (("--cluster", "a800"), "cluster: got 'a800', wanted one of a800-c1g1, a800-c1g2, a800-c1g4, or a JSON file"),
        (("--cluster", "none.json"), "cluster: cannot read none.json: No such file"),
        (("--num-devices", "3"), "num_devices: got 3, wanted a multiple of 2, those of one processor"),
        (("--popularity", "gini=much"), "popularity: got 'gini=much', wanted a number after gini="),
        (
            ("--popularity", "gini=0.1"),
            "popularity: got gini=0.1, wanted 0.1250, all 8 experts equally popular, to",
        ),
        (("--popularity", "none.npz"), "popularity: cannot read none.npz: No such file"),
        (("--policies", "best"), "policies: got best, wanted all or some of gpipe, gpipe-offload"),
        (("--num-stages", "65"), "num_stages: got 65, wanted 4, the accelerators, to 64, the layers"),
        (("--micro-batches", "9"), "micro_batches: got 9 of 8 sequences"),
        (("--drift", "2"), "drift: got 2.0, wanted 0"),
        (("--dtype", "bf16"), "dtype: got 'bf16', but A800-40GB-PCIe has a rate for fp32 only"),
        (("--predictor-accuracy", "2"), "predictor_accuracy: got 2.0, wanted 0 to 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: tuple[str, str], message: str) -> None:
    assert message in refused(*SMALL, *changes)
