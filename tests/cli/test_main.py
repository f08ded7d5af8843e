"""The command line: verbs and options reach what they name, errors are one line, help is quick."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import isthmus
from isthmus.cli.main import app
from isthmus.cli.tune import Policy, Schedule, tune
from isthmus.spec.errors import IsthmusError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, terminal_width=120)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[..., Any]], None]:
    """Puts a function where a verb looks for what it runs: module, name, function."""

    def put(module: str, name: str, function: Callable[..., Any]) -> None:
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)

    return put


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


TUNE = ("tune", "model", "--data", "train.jsonl", "--output", "out")


def test_version_is_the_package_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"isthmus {isthmus.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "profile", "tune", "embed", "worker", "bench", "plan", "simulate", "testbed"]),
        (["tune", "--help"], ["--data", "--policy", "--accelerator-memory", "--resume"]),
        (["profile", "--help"], ["--refresh"]),
        (["bench", "--help"], ["tune", "infer"]),
        (["plan", "infer", "--help"], ["--cluster", "--tokens", "--max-error", "--profile"]),
        (["simulate", "infer", "--help"], ["--device", "--cluster", "--bandwidths", "--published", "--sub-blocks"]),
        (["testbed", "--help"], ["up", "status", "run", "limit", "down", "sudo isthmus testbed up --devices 4"]),
        (["bench", "tune", "--help"], ["--policies", "--skew", "--cpu-speed", "--report"]),
    ],
)
def test_help_names_what_there_is(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert [word for word in words if word not in result.stdout] == []


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"], ["--version"]])
def test_help_loads_neither_torch_nor_plots(arguments: list[str]) -> None:
    script = (
        "import sys; from isthmus.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "heavy = sys.modules.keys() & {'torch', 'transformers', 'numpy', 'matplotlib'}; assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (IsthmusError("steps: got 0,\n wanted at least 1"), "error: steps: got 0, wanted at least 1"),
        (ValueError("odd"), "error: odd (ISTHMUS_TRACEBACK=1 shows where)"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "train.jsonl"),
            "error: [Errno 2] No such file: 'train.jsonl'",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: [Errno 28] No space left on device"),
        (IsthmusError("long " * 100), "error: " + " ".join(["long"] * 100)),
        (IsthmusError("[red]no markup[/red]"), "error: [red]no markup[/red]"),
    ],
)
def test_error_is_one_line_on_stderr_and_exit_code_2(fake, error: Exception, line: str) -> None:
    fake("isthmus.tuning.run", "tune", raising(error))
    result = run(*TUNE)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_error_may_set_the_exit_code(fake) -> None:
    class Interrupted(IsthmusError):
        exit_code = 130

    fake("isthmus.tuning.run", "tune", raising(Interrupted("stopped at step 3")))
    assert run(*TUNE).exit_code == 130


def test_error_in_a_nested_verb_is_one_line_too(fake) -> None:
    fake("isthmus.tuning.bench", "bench_tune", raising(IsthmusError("skew: got 2, wanted at most 1")))
    result = run("bench", "tune", "--skew", "2")
    assert (result.exit_code, result.stderr) == (2, "error: skew: got 2, wanted at most 1\n")


def test_traceback_is_shown_when_asked_for(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_TRACEBACK", "1")
    error = IsthmusError("steps")
    fake("isthmus.tuning.run", "tune", raising(error))
    assert run(*TUNE).exception is error


def test_bug_keeps_its_traceback(fake) -> None:
    bug = RuntimeError("queue not empty")
    fake("isthmus.tuning.run", "tune", raising(bug))
    assert run(*TUNE).exception is bug


def test_unknown_choice_is_refused_with_the_choices() -> None:
    result = run(*TUNE, "--policy", "magic")
    assert result.exit_code == 2
    assert "affinity" in result.stderr and "mobius" in result.stderr


def test_tune_passes_every_option_by_its_name(fake) -> None:
    calls: list[dict[str, Any]] = []
    fake("isthmus.tuning.run", "tune", lambda **options: calls.append(options))
    assert run(*TUNE, "--steps", "7", "--micro-batches", "2", "--eval-data", "e.jsonl", "--resume").exit_code == 0
    parameters = inspect.signature(tune).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    given = {"model": "model", "data": "train.jsonl", "output": Path("out")}
    assert calls == [defaults | given | {"steps": 7, "micro_batches": 2, "eval_data": "e.jsonl", "resume": True}]


def test_tune_in_python_has_the_same_names_and_defaults() -> None:
    theirs = inspect.signature(isthmus.tune).parameters
    ours = inspect.signature(tune).parameters
    assert {name: parameter.default for name, parameter in ours.items()} == {
        name: parameter.default for name, parameter in theirs.items()
    }


def test_choices_are_those_of_the_runtime() -> None:
    from isthmus.training.schedule import SCHEDULES
    from isthmus.tuning.policies import POLICIES

    def choices(option: Any) -> set[str]:
        return set(typing.get_args(typing.get_args(option)[0]))

    assert choices(Policy) == set(POLICIES)
    assert choices(Schedule) == set(SCHEDULES)


def test_bench_and_profile_pass_their_options(fake) -> None:
    calls: list[Any] = []
    fake("isthmus.tuning.bench", "bench_tune", lambda **options: calls.append(options))
    fake("isthmus.tuning.profile", "profile", lambda model, **options: calls.append((model, options["seq_len"])))
    assert run("bench", "tune", "--policies", "affinity,paper", "--report", "bench.json").exit_code == 0
    assert run("profile", "model", "--seq-len", "64").exit_code == 0
    assert calls == [
        {
            "model": None,
            "policies": "affinity,paper",
            "skew": "uniform,0.2,0.4",
            "cpu_speed": "1,0.5,0.25",
            "report": Path("bench.json"),
        },
        ("model", 64),
    ]


@pytest.mark.parametrize("name", ["isthmus.tuning.bench", "isthmus.tuning.profile"])
def test_what_the_verbs_run_is_there(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(
        AttributeError,
        match="has no attribute 'train'; it has __version__, decouple, evaluate, infer, pretrain, trace, tune",
    ):
        isthmus.train  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
