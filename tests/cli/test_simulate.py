"""``isthmus simulate infer`` as a user types it: a shape or a checkpoint, devices by name or from a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.simulation.devices import KINDS
from isthmus.spec.serialization import from_json
from isthmus.spec.simulated import PublishedReport, SimulateInferReport

PIS = ("--device", "raspberry-pi-4b", "--num-devices", "4")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", "infer", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", "infer", *arguments])
    assert result.exit_code == 2
    return result.stderr


def test_every_way_at_every_bandwidth_is_printed_and_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    shown = run(
        "bert-base",
        *PIS,
        "--sub-blocks",
        "4",
        "--bandwidths",
        "1000,125",
        "--codec",
        "fp32,int8",
        "--report",
        str(path),
    )
    report = from_json(SimulateInferReport, path.read_text())
    assert [cell.bits_per_s for cell in report.cells] == [1e9, 125e6]
    assert report.devices == (KINDS["raspberry-pi-4b"],) * 4
    for cell in report.cells:
        ways = {f"{row.strategy} {row.algorithm}".strip() for row in cell.rows}
        assert {"single", "sequence", "tensor two_step", "block gather", "block tensor"} <= ways
        assert all(way in shown for way in ways)
        assert sum(row.is_choice for row in cell.rows) == 1
        assert {row.codec for row in cell.rows} == {"fp32", "int8"}
    markdown = path.with_suffix(".md").read_text()
    assert "## 1000 Mbit/s" in markdown and "## 125 Mbit/s" in markdown
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "bert-base, 4 × raspberry-pi-4b, simulated" in shown
    again = tmp_path / "again.json"
    run(
        "bert-base",
        *PIS,
        "--sub-blocks",
        "4",
        "--bandwidths",
        "1000,125",
        "--codec",
        "fp32,int8",
        "--report",
        str(again),
    )
    assert again.read_bytes() == path.read_bytes()


def test_of_a_checkpoint_only_the_configuration_is_read(tmp_path: Path) -> None:
    """A decoupled one; there are no weights."""
    wanted = {"num_sub_blocks": 4, "original_layers": [2, 5]}
    decoupled_config(BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12), wanted).save_pretrained(
        tmp_path / "model"
    )
    path = tmp_path / "report.json"
    run(str(tmp_path / "model"), *PIS, "--report", str(path))
    [cell] = from_json(SimulateInferReport, path.read_text()).cells
    assert cell.bits_per_s is None
    assert {"single", "tensor", "sequence", "block"} == {row.strategy for row in cell.rows}
    assert "sub_blocks: the model is decoupled already" in refused(str(tmp_path / "model"), *PIS, "--sub-blocks", "4")


def test_devices_of_a_file_may_differ(tmp_path: Path) -> None:
    path, report = tmp_path / "hardware.json", tmp_path / "report.json"
    devices = [{"name": "fast", "kind": "raspberry-pi-5"}, {"name": "slow", "kind": "raspberry-pi-4b", "count": 2}]
    path.write_text(json.dumps({"schema_version": 1, "devices": devices}))
    shown = run("bert-base", "--cluster", str(path), "--report", str(report))
    assert "bert-base, fast, slow-1, slow-2, simulated" in shown
    found = from_json(SimulateInferReport, report.read_text())
    uneven = next(row for row in found.cells[0].rows if row.strategy == "sequence")
    assert uneven.weights[0] > 1.5 * uneven.weights[1]


def test_tokens_are_asked_of_decoders() -> None:
    assert "first" in run("gpt2", *PIS, "--tokens", "16", "--new-tokens", "4", "--dtype", "int8")


@pytest.mark.parametrize("width", [80, 160])
def test_known_devices_are_listed(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run("--list-devices")
    assert all(name in shown for name in KINDS)
    assert ("533 shared" in shown) == (width == 160) and "shared" in shown
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width


def test_the_published_table_is_shown_beside_the_simulated_one(tmp_path: Path) -> None:
    path = tmp_path / "published.json"
    shown = run("--published", "--report", str(path))
    report = from_json(PublishedReport, path.read_text())
    for each in report.figures:
        assert f"{each.published:.2f} → {each.simulated:.2f} ({each.deviation:+.0%})" in shown
    assert path.with_suffix(".md").read_text().startswith("| model | Mbit/s | TP | SP | BP+TP | best BP | ours fp32 |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: got none"),
        (["bert-base"], "device, cluster: wanted one of them; --list-devices shows"),
        (["bert-huge", *PIS], "model: got 'bert-huge', wanted a directory with a config.json or one of bert-base"),
        (["bert-base", "--device", "cray"], "device: got 'cray', wanted one of raspberry-pi-4b, raspberry-pi-5"),
        (["bert-base", *PIS, "--tokens", "600"], "tokens: got 600, wanted at most the 512"),
        (["bert-base", *PIS, "--new-tokens", "4"], "new_tokens: got 4 for 'bert', an encoder; wanted 0"),
        (["bert-base", *PIS, "--bandwidths", "1000,fast"], "bandwidths: got '1000,fast', wanted numbers"),
        (["bert-base", *PIS, "--bandwidths", "0"], "bandwidths: got 0, wanted Mbit/s above 0"),
        (["bert-base", *PIS, "--codec", "fp8"], "codec: got fp8, wanted all or some of fp32, bf16, int8, int4"),
        (["bert-base", *PIS, "--dtype", "bf16"], "dtype: raspberry-pi-4b has no bf16, wanted one of fp32, int8"),
        (["bert-base", *PIS, "--groups", "4"], "groups, heads: say how a model is decoupled"),
        (["bert-base", *PIS, "--sub-blocks", "4", "--groups", "12"], "groups: got 12 for 12 layers"),
        (["bert-base", "--cluster", "x.json", "--num-devices", "3"], "num_devices: is for --device"),
        (["bert-base", "--cluster", "x.json", *PIS], "device, cluster: wanted one of them"),
        (["bert-base", "--cluster", "none.json"], "cluster: cannot read none.json: No such file"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: list[str], message: str) -> None:
    told = refused(*arguments)
    assert message in told and told.count("\n") == 1


def test_neither_torch_nor_transformers_is_loaded_for_a_shape() -> None:
    script = (
        "import sys; from isthmus.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "heavy = sys.modules.keys() & {'torch', 'transformers'}; assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", script, "simulate", "infer", "bert-base", *PIS], check=True, stdout=subprocess.DEVNULL
    )
