"""A run that was stopped and resumed is, to the last bit, the run that was not."""

from __future__ import annotations

import filecmp
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.support import EMULATED, Inputs, Tune, error_line, losses, report, same_weights, succeed

from isthmus.models.tiny import write_tiny_checkpoint

AfterStep = Callable[[int, Callable[[], object]], None]
EVERY = ("--steps", "6", "--save-every", "2")


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def stopped(inputs: Inputs, run: Tune, tmp_path: Path, after_step: AfterStep) -> Path:
    """A run of 6 steps, stopped after the third."""
    after_step(3, stop)
    assert "after step 3" in error_line(run(inputs.arguments(tmp_path / "stopped", *EVERY)), 128 + signal.SIGTERM)
    return tmp_path / "stopped"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("at", [1, 5])
def test_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    dropout: float, at: int, inputs: Inputs, run: Tune, tmp_path: Path, after_step: AfterStep
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": dropout}))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(run(inputs.arguments(whole, *EVERY, model=model)))
    after_step(at, stop)
    # Evaluating in between must change nothing either.
    more = (*EVERY, "--eval-data", str(inputs.eval_data), "--eval-every", "1", "--eval-batches", "1")
    error_line(run(inputs.arguments(parts, *more, model=model)), 128 + signal.SIGTERM)
    assert not (parts / "config.json").exists()
    succeed(run(inputs.arguments(parts, *more, "--resume", model=model)))
    assert losses(parts) == losses(whole)
    assert [step["step"] for step in report(parts)["steps"]] == [1, 2, 3, 4, 5, 6]
    assert (parts / "timeline.png").exists() and (parts / "popularity.png").exists()
    assert same_weights(parts, whole)


def test_dropout_is_really_applied(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    """Else the test above would say nothing about its random numbers."""
    found = []
    for dropout in (0.0, 0.2):
        model, output = tmp_path / f"model-{dropout}", tmp_path / f"out-{dropout}"
        shutil.copytree(inputs.model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"attention_dropout": dropout}))
        succeed(run(inputs.arguments(output, "--steps", "1", model=model)))
        found.append(losses(output))
    assert found[0] != found[1]


def test_emulated_run_resumes_with_its_predictor(
    inputs: Inputs, run: Tune, tmp_path: Path, after_step: AfterStep
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = (*EVERY, *EMULATED, "--accelerator-memory", "2MB")
    succeed(run(inputs.arguments(whole, *more)))
    after_step(3, stop)
    error_line(run(inputs.arguments(parts, *more)), 128 + signal.SIGTERM)
    succeed(run(inputs.arguments(parts, *more, "--resume")))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_broken_newest_checkpoint_is_passed_over(stopped: Path, inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    succeed(run(inputs.arguments(whole, *EVERY)))
    file = stopped / "checkpoints" / "step-00000003" / "units-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = run(inputs.arguments(stopped, *EVERY, "--resume"))
    succeed(result)
    assert "passing over a broken checkpoint" in result.stderr
    assert "resuming after step 2" in result.stderr
    assert same_weights(stopped, whole)


def test_resuming_a_finished_run_writes_the_same_model_again(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    output, again = tmp_path / "out", tmp_path / "again"
    succeed(run(inputs.arguments(output)))
    shutil.copytree(output, again)
    (again / "model.safetensors").unlink()
    succeed(run(inputs.arguments(again, "--resume")))
    assert same_weights(output, again)
    assert report(again)["steps"] == report(output)["steps"]
    assert filecmp.cmp(again / "timeline.json", output / "timeline.json", shallow=False)


def test_resuming_where_no_checkpoint_was_written_yet_starts_anew(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    result = run(inputs.arguments(tmp_path / "out", "--resume"))
    succeed(result)
    assert "holds no checkpoint yet: starting with step 1" in result.stderr
    assert len(losses(tmp_path / "out")) == 4


def test_resuming_with_something_else_is_refused_and_changes_nothing(
    stopped: Path, inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    before = sorted(stopped.rglob("*"))
    other = tmp_path / "other"
    shutil.copytree(inputs.model, other)
    write_tiny_checkpoint("qwen3_moe", other, 0, "fp32", vocab_size=300)
    for message, arguments in {
        "the checkpoint's dataset is": inputs.arguments(stopped, *EVERY, "--resume", data=inputs.eval_data),
        "the checkpoint's seed is 0, this run's is 7": inputs.arguments(stopped, *EVERY, "--resume", "--seed", "7"),
        "steps: got 2, but 3 are done already": inputs.arguments(stopped, "--resume", "--steps", "2"),
        "was written for another model or dtype": inputs.arguments(stopped, *EVERY, "--resume", model=other),
        "resume with the model and the dtype": inputs.arguments(stopped, *EVERY, "--resume", "--dtype", "bf16"),
    }.items():
        assert message in error_line(run(arguments))
    assert sorted(stopped.rglob("*")) == before
