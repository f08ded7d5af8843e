"""``isthmus generate`` as a user types it: alone, with a worker, under torchrun's variables, and with bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.two_processes import ISTHMUS, run_on_two
from tests.inference.conftest import add_tokenizer, checkpoint  # noqa: F401
from tests.inference.test_block_parallel import saved  # noqa: F401
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.inference.engine import Engine


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:  # noqa: F811
    return add_tokenizer(checkpoint("llama"))


@pytest.fixture(scope="module")
def copy(saved: Callable[[str, str], Path]) -> Path:  # noqa: F811
    """A decoupled model, 4 sub-blocks."""
    return add_tokenizer(saved("llama", "four"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))


def options(model: Path, *more: str) -> list[str]:
    return ["generate", str(model), "--prompt", "one two", "--max-new-tokens", "6", *more]


def text_of(model: Path, **settings) -> str:
    return Engine(model).generate(["one two"], max_new_tokens=6, **settings)[0].text


def test_one_prompt_streams_its_text_and_tells_the_rate_apart(model: Path) -> None:
    result = CliRunner().invoke(app, options(model))
    assert result.exit_code == 0, result.output
    assert result.stdout == text_of(model) + "\n"
    assert result.stderr.startswith("6 tokens, the first after ") and result.stderr.endswith(" tokens/s\n")


def test_several_prompts_are_json_lines(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("three\nfour five\n")
    result = CliRunner().invoke(app, options(model, "--prompt-file", str(tmp_path / "prompts")))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["one two", "three", "four five"]
    assert all(line["num_tokens"] == 6 and line["ended_by"] == "length" for line in lines)
    wanted = Engine(model).generate(["one two", "three", "four five"], max_new_tokens=6)
    assert [line["text"] for line in lines] == [completion.text for completion in wanted]


def test_the_same_seed_draws_the_same_text(model: Path) -> None:
    drawn = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--seed", "3"]
    first, again = (CliRunner().invoke(app, options(model, *drawn)).stdout for _ in range(2))
    assert first == again == text_of(model, temperature=1.5, top_k=20, top_p=0.9, seed=3) + "\n"


@pytest.mark.parametrize("strategy", ["auto", "tensor", "block"])
def test_as_processes_of_torchrun_only_the_first_prints(strategy: str, model: Path, copy: Path) -> None:
    model = copy if strategy == "block" else model
    outputs = run_on_two(*options(model, "--strategy", strategy))
    assert outputs[0][0] == text_of(model) + "\n"
    assert outputs[1] == ("", "")


def test_with_a_worker(model: Path) -> None:
    worker = subprocess.Popen([ISTHMUS, "worker", "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert worker.stderr is not None
        port = worker.stderr.readline().rpartition(":")[2].strip()
        result = CliRunner().invoke(app, options(model, "--devices", f"127.0.0.1:{port}", "--strategy", "tensor"))
        assert result.exit_code == 0, result.output
        assert result.stdout == text_of(model) + "\n"
    finally:
        worker.terminate()
        worker.communicate()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", "100000"], "max_new_tokens: got 100000 after a prompt of"),
        (["--top-p", "1.5"], "top_p: got 1.5, wanted above 0, at most 1"),
        (["--chat"], "chat: the model's tokenizer has no chat template"),
        (["--stop", ""], "stop: got ['']"),
    ],
)
def test_bad_input_is_one_line(more: list[str], message: str, model: Path) -> None:
    result = CliRunner().invoke(app, options(model, *more))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_an_encoder_is_refused(checkpoint: Callable[[str], Path]) -> None:  # noqa: F811
    result = CliRunner().invoke(app, options(add_tokenizer(checkpoint("bert"))))
    assert result.exit_code == 2
    assert "'bert' is an encoder; wanted a decoder" in result.stderr


def test_a_model_without_a_tokenizer_is_named(model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    result = CliRunner().invoke(app, options(bare))
    assert result.exit_code == 2
    assert f"tokenizer: {bare} holds no tokenizer that can be loaded" in result.stderr


def test_no_prompt_is_named(model: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(model)])
    assert result.exit_code == 2
    assert "prompt: got none, wanted --prompt or --prompt-file" in result.stderr
