"""``isthmus embed`` and ``isthmus worker`` as a user types them, alone, as torchrun's processes and with a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.cli.two_processes import ISTHMUS, run_on_two
from tests.inference.conftest import add_tokenizer, checkpoint  # noqa: F401
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.inference.engine import Engine

TEXTS = ["one two three", "four"]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:  # noqa: F811
    return add_tokenizer(checkpoint("bert"))


def vectors(lines: str) -> torch.Tensor:
    found = [json.loads(line) for line in lines.splitlines()]
    assert [line["text"] for line in found] == TEXTS
    return torch.tensor([line["embedding"] for line in found])


def options(model: Path, *more: str) -> list[str]:
    return ["embed", str(model), "--text", TEXTS[0], "--text", TEXTS[1], *more]


def test_alone_from_a_file_to_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    output = tmp_path / "vectors.jsonl"
    arguments = ["embed", str(model), "--text-file", str(tmp_path / "texts.txt"), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert torch.equal(vectors(output.read_text()), torch.stack(Engine(model).embed(TEXTS)))


@pytest.mark.parametrize("strategy", ["auto", "tensor"])
def test_as_processes_of_torchrun_only_the_first_prints(strategy: str, model: Path) -> None:
    outputs = run_on_two(*options(model, "--strategy", strategy))
    torch.testing.assert_close(vectors(outputs[0][0]), torch.stack(Engine(model).embed(TEXTS)), rtol=1e-4, atol=1e-5)
    assert outputs[1][0] == ""


def test_under_torchrun(model: Path, port: int) -> None:
    torchrun = [str(Path(ISTHMUS).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port)]
    result = subprocess.run(
        [*torchrun, "--no-python", ISTHMUS, *options(model)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(vectors(result.stdout), torch.stack(Engine(model).embed(TEXTS)), rtol=1e-4, atol=1e-5)


def test_with_a_worker_that_ends_when_told(model: Path) -> None:
    worker = subprocess.Popen([ISTHMUS, "worker", "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert worker.stderr is not None
        port = worker.stderr.readline().rpartition(":")[2].strip()
        result = CliRunner().invoke(app, options(model, "--devices", f"127.0.0.1:{port}"))
        assert result.exit_code == 0, result.output
        torch.testing.assert_close(
            vectors(result.stdout), torch.stack(Engine(model).embed(TEXTS)), rtol=1e-4, atol=1e-5
        )
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert worker.stderr.read().splitlines()[-1] == "stopped"
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "MODEL"], "text: got none, wanted --text or --text-file"),
        (["embed", "MODEL", "--text", "x", "--weights", "1,-1"], "weights: got '1,-1', wanted numbers from 0 up"),
        (["embed", "MODEL", "--text", "x", "--weights", "1,1"], "weights: got 2, wanted 1, one for each device"),
        (["embed", "MODEL", "--text", "x", "--devices", "127.0.0.1:9"], "127.0.0.1:9 does not answer"),
        (["embed", "/nowhere", "--text", "x"], "/nowhere is not a directory"),
        (["worker", "--listen", "192.0.2.1"], "cannot listen on 192.0.2.1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, model: Path) -> None:
    result = CliRunner().invoke(app, [str(model) if part == "MODEL" else part for part in arguments])
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
