"""``isthmus plan tune`` as a user types it: from a configuration alone, on clusters by name and by file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.models.tiny import tiny_config
from isthmus.reporting.chrome_trace import read_chrome_trace
from isthmus.simulation.tuning.clusters import a800
from isthmus.spec.plan_tune import PlanTuneReport
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.tune_cluster import TuneCluster

SIZE = ("--seq-len", "16", "--micro-batches", "4", "--dtype", "fp32")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_config("mixtral", num_hidden_layers=8).save_pretrained(path)
    return str(path)


def small_cluster(path: Path, *, num_hosts: int = 2, **accelerator: Any) -> Path:
    """Hosts with one accelerator each, described in a file."""
    whole = a800(1, num_hosts)
    hosts = [replace(host, accelerator=replace(host.accelerator, **accelerator)) for host in whole.hosts]
    path.write_text(to_json(replace(whole, name="lab", hosts=tuple(hosts))))
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", "tune", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", "tune", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def test_a_plan_says_whether_it_fits_how_fast_it_is_and_what_would_help(model: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / "plan.json"
    asked = (model, "--cluster", "a800-c1g2", *SIZE, "--popularity", "gini=0.4", "--report", str(path))
    printed = run(*asked)
    report = from_json(PlanTuneReport, path.read_text())
    assert report.fits and report.step is not None and report.cluster == a800(2)
    assert report.skewness == pytest.approx(0.4, abs=0.05)
    assert report.step.tokens_per_s == pytest.approx(4 * 16 / report.step.step_s)
    assert 0 < report.step.bound_share <= 1 + 1e-9
    assert sum(need.num_layers for need in report.devices) == 8 and len(report.hosts) == 2
    assert all(need.total_bytes >= need.minimum_bytes for need in report.devices)
    names = {link.name for link in report.links}
    assert names >= {"accelerator 3", "root 1", "network of host 0"}
    assert 1 <= len(report.changes) <= 3
    gains = [change.gain for change in report.changes]
    assert all(gain is not None and gain >= 1.02 for gain in gains) and gains == sorted(gains, key=lambda g: -(g or 0))
    for words in ("it fits", "tokens/s", "of the bound", "busy: ", "what limits it most: ", "what would help most"):
        assert words in printed
    assert run(*asked) == printed


def test_what_does_not_fit_says_where_by_how_much_and_with_what_it_would(model: str, tmp_path: Path) -> None:
    cluster = small_cluster(tmp_path / "cluster.json", memory_bytes=300_000)
    path = tmp_path / "plan.json"
    printed = run(model, "--cluster", str(cluster), *SIZE, "--micro-batches", "64", "--report", str(path))
    report = from_json(PlanTuneReport, path.read_text())
    assert not report.fits and report.step is None and report.limiting == ""
    assert "it does not fit" in printed and "2 of 2 accelerators have too little memory: accelerator " in printed
    assert max(need.short_bytes for need in report.devices) > 0
    assert report.changes and all(change.fits for change in report.changes)
    assert "accelerators with 1.00 GiB" in {change.change for change in report.changes}
    larger = small_cluster(tmp_path / "larger.json", memory_bytes=max(need.minimum_bytes for need in report.devices))
    assert "it fits" in run(model, "--cluster", str(larger), *SIZE, "--micro-batches", "64", "--no-changes")


def test_a_host_that_is_too_small_is_named(model: str, tmp_path: Path) -> None:
    whole = from_json(TuneCluster, small_cluster(tmp_path / "cluster.json").read_text())
    hosts = [replace(host, memory_bytes=100_000) for host in whole.hosts]
    (tmp_path / "cluster.json").write_text(to_json(replace(whole, hosts=tuple(hosts))))
    printed = run(model, "--cluster", str(tmp_path / "cluster.json"), *SIZE)
    assert "2 of 2 hosts have too little memory: host 0 is short of" in printed
    assert "hosts with 1.00 GiB" in printed


def test_a_smaller_budget_leaves_fewer_slots(model: str, tmp_path: Path) -> None:
    cluster, path = str(small_cluster(tmp_path / "cluster.json")), tmp_path / "plan.json"

    def plan(memory: str) -> PlanTuneReport:
        run(model, "--cluster", cluster, *SIZE, "--no-changes", "--accelerator-memory", memory, "--report", str(path))
        return from_json(PlanTuneReport, path.read_text())

    roomy = plan("1GiB")
    least = max(need.minimum_bytes for need in roomy.devices)
    tight = plan(str(least + 2 * roomy.devices[0].slot_bytes))
    assert tight.fits and not plan(str(least - 1)).fits
    for much, little in zip(roomy.devices, tight.devices, strict=True):
        assert little.total_bytes <= little.memory_bytes and little.minimum_bytes == much.minimum_bytes
        assert little.num_slots < little.num_experts < much.num_slots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--cluster", "a800"), "cluster: got 'a800', wanted one of a800-c1g1, a800-c1g2, a800-c1g4, or a JSON file"),
        (("--cluster", "none.json"), "cluster: cannot read none.json: No such file"),
        (("--num-stages", "9"), "num_stages: got 9, wanted 4, the accelerators, to 8, the layers"),
        (("--num-devices", "16"), "cluster: a800-c1g2 has 16 accelerators, wanted 8 at the most"),
        (("--popularity", "none.npz"), "popularity: cannot read none.npz: No such file"),
        (("--popularity", "gini=2"), "popularity: got gini=2, wanted 0.2500"),
        (("--dtype", "bf16"), "dtype: got 'bf16', but A800-40GB-PCIe has a rate for fp32 only"),
        (("--accelerator-memory", "much"), "accelerator_memory: got 'much'"),
    ],
)
def test_what_cannot_be_asked_is_refused(model: str, changes: tuple[str, str], message: str) -> None:
    assert message in refused(model, "--cluster", "a800-c1g2", *SIZE, *changes)


def test_models_and_clusters_that_cannot_be_are_refused(model: str, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    assert "has no routed experts" in refused(str(tmp_path / "dense"), "--cluster", "a800-c1g1")
    assert "model: " in refused("./none", "--cluster", "a800-c1g1")
    cluster = small_cluster(tmp_path / "cluster.json")
    content = json.loads(cluster.read_text())
    del content["hosts"][0]["memory_bytes"]
    cluster.write_text(json.dumps(content))
    message = refused(model, "--cluster", str(cluster))
    assert str(cluster) in message and "memory_bytes" in message


def test_without_a_cluster_it_is_this_machine(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "plan.json"
    emulated = ("--emulate", "h2d=1GB/s,d2h=1GB/s,threads=1", "--accelerator-memory", "8MiB")
    printed = run(model, *SIZE, *emulated, "--no-changes", "--report", str(path))
    report = from_json(PlanTuneReport, path.read_text())
    assert "on 1 accelerator of this machine: it fits" in printed
    assert report.step is not None and report.step.step_s > 0
    assert report.devices[0].memory_bytes == 8 << 20 and report.devices[0].total_bytes <= 8 << 20
    assert report.step.note == "the runtime played through with what was measured here"


def test_processes_of_this_machine_share_it(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    path, timeline = tmp_path / "plan.json", tmp_path / "step.json"
    asked = (*SIZE, "--accelerator", "host", "--num-devices", "2", "--no-changes")
    printed = run(model, *asked, "--report", str(path), "--timeline", str(timeline))
    report = from_json(PlanTuneReport, path.read_text())
    assert "on 2 accelerators of this machine: it fits" in printed
    assert report.step is not None and report.step.num_stages == 4
    assert report.devices == () and report.links == () and len(report.hosts) == 1
    devices = read_chrome_trace(timeline)
    assert len(devices) == 2 and timeline.with_suffix(".png").exists()
    layers = [{span.layer for span in device.spans if span.kind == "dense"} - {None} for device in devices]
    assert layers[0].isdisjoint(layers[1]) and layers[0] | layers[1] == {*range(8)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--emulate", "h2d=1GB/s,d2h=1GB/s"), "accelerator: emulated needs --emulate h2d=2GB/s,d2h=2GB/s and --accel"),
        (("--accelerator", "emulated"), "accelerator: emulated needs --emulate"),
        (("--cluster", "a800-c1g2", "--emulate", "h2d=1GB/s,d2h=1GB/s"), "accelerator, emulate, timeline: are of this"),
        (("--cluster", "a800-c1g2", "--timeline", "step.json"), "accelerator, emulate, timeline: are of this machine"),
        pytest.param(
            (),
            "cluster: got none, and this machine has no GPU to plan for; give --cluster FILE or NAME",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_machine_that_cannot_be_planned_for_is_refused(model: str, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(model, *SIZE, *arguments)


def test_help_teaches() -> None:
    said = " ".join(CliRunner().invoke(app, ["plan", "tune", "--help"]).stdout.split())
    for words in ("Say before anything is downloaded", "isthmus plan tune ./my-model", "isthmus trace", "--no-changes"):
        assert words in said
