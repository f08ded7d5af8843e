"""A tiny model with a tokenizer and real text, and ``isthmus tune`` on it in this process: made once for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.integration.support import VOCAB_SIZE, Inputs, Tune
from typer.testing import CliRunner, Result

from isthmus.cli.main import app
from isthmus.data import standard_library_text, train_tokenizer
from isthmus.models.tiny import write_tiny_checkpoint
from isthmus.reporting.progress import StepView, TrainingProgress


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    texts = standard_library_text(60_000)
    paths = Inputs(folder / "model", folder / "train.jsonl", folder / "eval.jsonl")
    write_tiny_checkpoint("mixtral", paths.model, 0, "fp32", vocab_size=VOCAB_SIZE)
    train_tokenizer(texts, VOCAB_SIZE).save_pretrained(paths.model)
    held_out = texts.pop()
    paths.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    paths.eval_data.write_text(json.dumps({"text": held_out[:2000]}) + "\n")
    return paths


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Profiles are measured once for all of these tests, and not kept."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ISTHMUS_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def run() -> Tune:
    """Runs the command line in this process: exit code, stdout and stderr as a shell would see them."""

    def run_(arguments: list[str]) -> Result:
        result = CliRunner().invoke(app, arguments, terminal_width=120)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run_


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Calls a function when a step of the next run has been shown, before it can be saved."""

    def register(number: int, function: Callable[[], object]) -> None:
        show = TrainingProgress.step

        def step(self: TrainingProgress, view: StepView) -> None:
            show(self, view)
            if view.step == number:
                monkeypatch.setattr(TrainingProgress, "step", show)
                function()

        monkeypatch.setattr(TrainingProgress, "step", step)

    return register
