"""``isthmus plan infer`` of a plain checkpoint says what decoupling it would bring, on devices that are described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.inference.conftest import CONFIGS, DECODERS, checkpoint  # noqa: F401
from tests.planning.clusters import cluster, device, link
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.models.decoupled import architectures
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import weigh
from isthmus.planning.plans import Question
from isthmus.reporting.human import human_s
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import InferenceRequest
from isthmus.spec.report import PlanInferReport
from isthmus.spec.serialization import from_json, to_json

assert architectures.CLASSES  # AutoModel knows decoupled models now
SLOW = 1e7
"""Operations a second: computing takes longer than exchanges, however small the model."""


@pytest.fixture(params=["bert", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def profile_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """(model, number of devices) -> a file with what was measured of its layers on slow devices."""
    monkeypatch.setenv("COLUMNS", "250")

    def write(model: Path, num_devices: int, bytes_per_s: float = 1e5, dtypes: Sequence[str] = ("fp32",)) -> Path:
        one = device(ShardReader(model).spec, SLOW, dtypes=dtypes)
        found = cluster([one] * num_devices, [link(bytes_per_s)] * num_devices)
        path = tmp_path / f"profile-{num_devices}.json"
        path.write_text(to_json(found))
        return path

    return write


def plan(model: Path, profile: Path, report: Path, *options: str) -> tuple[str, PlanInferReport]:
    """What is printed below the table, and the report."""
    arguments = ("plan", "infer", str(model), "--profile", str(profile), "--report", str(report), *options)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout[result.stdout.index("\n→ ") + 1 :], from_json(PlanInferReport, report.read_text())


def decoupled(family: str, directory: Path, num_sub_blocks: int) -> Path:
    """A checkpoint of the family's tiny model, decoupled with its last layer original."""
    config = decoupled_config(CONFIGS[family](), {"num_sub_blocks": num_sub_blocks, "original_layers": [2]})
    kind = AutoModelForCausalLM if family in DECODERS else AutoModel
    kind.from_config(config).save_pretrained(directory)
    return directory


def test_it_is_what_the_decoupled_checkpoint_is_then_planned_to_take(
    family: str,
    checkpoint: Callable[[str], Path],  # noqa: F811
    profile_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = ("--tokens", "8", "--codec", "int8", *(("--new-tokens", "8") if family in DECODERS else ()))
    model = checkpoint(family)
    printed, report = plan(model, profile_of(model, 4), tmp_path / "plain.json", *options)
    outlook = report.decoupled
    assert outlook is not None and outlook.num_sub_blocks in (2, 4) and outlook.original_layers == (2,)
    assert outlook.times_as_fast == report.chosen.latency_s / outlook.predicted.latency_s > 1.03
    devices = len(outlook.predicted.plan.devices)
    assert printed.splitlines()[1] == (
        f"Decoupled into {outlook.num_sub_blocks} sub-blocks, layer 2 original, this request would take "
        f"{human_s(outlook.predicted.latency_s)} (block parallel on {devices} devices, int8 wire) instead of "
        f"{human_s(report.chosen.latency_s)}: {outlook.times_as_fast:.2f} × as fast. "
        "See `isthmus decouple MODEL --plan`."
    )
    # The plain model's report says what was measured, and that is all there is of the decoupled one.
    copy = decoupled(family, tmp_path / "copy", outlook.num_sub_blocks)
    printed, own = plan(copy, tmp_path / "plain.json", tmp_path / "copy.json", *options)
    assert own.chosen == outlook.predicted
    assert own.decoupled is None and "ecoupl" not in printed


def test_on_one_device_and_where_it_is_slower_it_says_so(
    checkpoint: Callable[[str], Path],  # noqa: F811
    profile_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = checkpoint("bert")
    printed, report = plan(model, profile_of(model, 1), tmp_path / "report.json")
    assert printed.splitlines()[1:] == [
        "Decoupling this model would bring nothing here: sub-blocks are for several devices."
    ]
    assert report.decoupled is None and report.chosen.plan.strategy == "single"
    printed, report = plan(model, profile_of(model, 2, 1e12), tmp_path / "report.json", "--tokens", "64")
    assert printed.splitlines()[1].startswith(
        "Decoupling this model would bring nothing here: into 2 sub-blocks, layer 2 original, this request would take "
    )
    assert report.decoupled is not None and report.decoupled.times_as_fast < 1


def test_of_a_model_that_cannot_be_decoupled_it_says_nothing(
    checkpoint: Callable[[str], Path],  # noqa: F811
    profile_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = checkpoint("distilbert")
    printed, report = plan(model, profile_of(model, 4), tmp_path / "report.json")
    assert report.decoupled is None and "ecoupl" not in printed


def test_where_memory_is_short_it_plans_for_devices_that_are_frugal_with_it(
    checkpoint: Callable[[str], Path],  # noqa: F811
    profile_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = checkpoint("bert")
    path = profile_of(model, 2)
    profile = from_json(ClusterProfile, path.read_text())
    question = Question(spec=ShardReader(model).spec, request=InferenceRequest(num_tokens=64), profile=profile)
    frugally, usually = (
        min(max(each.memory_bytes) for each in weigh(replace(question, is_frugal=is_frugal)))
        for is_frugal in (True, False)
    )
    assert frugally < usually
    short = tuple(replace(each, free_memory_bytes=(frugally + usually) // 2) for each in profile.devices)
    path.write_text(to_json(replace(profile, devices=short)))
    printed, report = plan(model, path, tmp_path / "report.json", "--tokens", "64")
    assert "Memory is short: devices give it back as soon as it is free" in printed
    assert report.chosen.memory_bytes_per_device <= (frugally + usually) // 2


def test_the_table_breaks_no_word_on_80_columns_and_has_all_of_them_where_they_fit(
    checkpoint: Callable[[str], Path],  # noqa: F811
    profile_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = checkpoint("bert")
    arguments = ("plan", "infer", str(model), "--profile", str(profile_of(model, 4)), "--rows", "3")
    shown: dict[int, str] = {}
    for width in (80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        shown[width] = result.stdout[: result.stdout.index("\n→ ")]
        assert "…" not in shown[width] and max(map(len, shown[width].splitlines())) <= width
        assert "0,1,2,3" in shown[width] and "predicted" in shown[width] and "sequence" in shown[width]
    assert "exchanges" in shown[160] and "exchanges" not in shown[80] and "dtype" not in shown[80]
    several = str(profile_of(model, 4, dtypes=("fp32", "bf16", "int8")))
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, (*arguments[:4], several, "--dtype", "auto", "--max-error", "1"))
    assert result.exit_code == 0, result.output
    told = result.stdout
    assert "dtype" in told and "int8" in told and "…" not in told
