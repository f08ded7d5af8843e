"""What the tests of whole runs share: a command line, what it says, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

VOCAB_SIZE = 300
EMULATED = ("--accelerator", "emulated", "--emulate", "h2d=200MB/s,d2h=200MB/s,threads=1")


@dataclass(frozen=True)
class Inputs:
    """Paths of what a run reads."""

    model: Path
    data: Path
    eval_data: Path

    def arguments(self, output: Path, *more: str, model: Path | None = None, data: Path | None = None) -> list[str]:
        """A command line of 4 quick steps on the host; ``more`` comes later and wins."""
        size = ("--seq-len", "32", "--micro-batches", "2", "--dtype", "fp32", "--steps", "4")
        how = ("--learning-rate", "1e-2", "--accelerator", "host")
        where = ("--data", str(data or self.data), "--output", str(output))
        return ["tune", str(model or self.model), *where, *size, *how, *more]


Tune = Callable[[list[str]], Result]


def succeed(result: Result) -> None:
    assert result.exit_code == 0, result.stderr


def error_line(result: Result, exit_code: int = 2) -> str:
    """The one line that tells what is wrong; what comes before it on stderr is progress."""
    assert result.exit_code == exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in progress if "rror" in line]
    return last


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in report(output)["steps"]]


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two models are the same to the last bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def poisoned(model: Path, copy: Path) -> Path:
    """The model with one weight that is not a number."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
