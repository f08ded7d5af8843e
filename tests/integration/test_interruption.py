"""Signals, crashes and full disks: a run ends cleanly, and what had been saved is whole."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.integration.support import Inputs, Tune, error_line, losses, report, same_weights, succeed
from transformers import AutoModelForCausalLM

from isthmus.reporting.progress import TrainingProgress
from isthmus.training.checkpoints import find_resumable
from isthmus.training.interruption import Interrupted, StopSignals

AfterStep = Callable[[int, Callable[[], object]], None]
WAIT_S = 120.0
ISTHMUS = "from isthmus.cli.main import app; app()"


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that does not outlive the block."""
    child = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    killer = threading.Timer(WAIT_S, child.kill)
    killer.start()
    try:
        yield child
    finally:
        killer.cancel()
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


def lines_until(child: subprocess.Popen[str], wanted: str) -> str:
    """What the process says, up to the first line with ``wanted``. Fails if it ends before."""
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if wanted in line:
            return "".join(said)
    raise AssertionError(f"no {wanted!r} in: {''.join(said)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_run_can_be_finished(
    number: signal.Signals, inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with process("-c", ISTHMUS, *inputs.arguments(output, "--steps", "100000")) as child:
        lines_until(child, "step 1/100000")
        child.send_signal(number)
        said = lines_until(child, "error: ")
        assert child.wait(WAIT_S) == 128 + number
    assert "Traceback" not in said
    found = re.search(rf"error: stopped by {number.name} after step (\d+); its state is saved", said)
    assert found, said
    directory = find_resumable(output, notify=pytest.fail)
    assert directory == output / "checkpoints" / f"step-{int(found[1]):08d}"
    assert not (output / "config.json").exists()
    num_steps = int(found[1]) + 1
    succeed(run(inputs.arguments(output, "--steps", str(num_steps), "--resume")))
    assert len(losses(output)) == num_steps


KILLED_WHILE_SAVING = """
import os, signal, sys
from isthmus.cli.main import app
from isthmus.tuning import checkpoint

write = checkpoint.write_tensors

def write_and_die(tensors, path):
    write(tensors, path)
    if "step-00000002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.write_tensors = write_and_die
app(sys.argv[1:])
"""


def test_killed_while_saving_the_checkpoint_before_is_whole(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    every = ("--save-every", "1")
    with process("-c", KILLED_WHILE_SAVING, *inputs.arguments(output, *every)) as child:
        assert child.wait(WAIT_S) == -signal.SIGKILL
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert [name for name in names if not name.startswith(".step-00000002.")] == ["step-00000001"]
    assert len(names) == 2
    succeed(run(inputs.arguments(whole, *every)))
    result = run(inputs.arguments(output, *every, "--resume"))
    succeed(result)
    assert "resuming after step 1" in result.stderr
    assert losses(output) == losses(whole)
    assert same_weights(output, whole)
    assert not [path for path in output.rglob(".*")]


def test_signal_before_the_first_step_ends_at_once(
    inputs: Inputs, run: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def phase(self: TrainingProgress, text: str, fraction: float | None = None) -> None:
        said.append(text)
        if text == "reading weights":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "phase", phase)
    line = error_line(run(inputs.arguments(tmp_path / "out")), 128 + signal.SIGINT)
    assert "stopped at once by SIGINT" in line
    assert said[-1] == "reading weights"
    assert not list((tmp_path / "out").iterdir())


def test_second_signal_does_not_wait_for_the_checkpoint(
    inputs: Inputs, run: Tune, tmp_path: Path, after_step: AfterStep
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    after_step(3, twice)
    output = tmp_path / "out"
    line = error_line(run(inputs.arguments(output, "--save-every", "2")), 128 + signal.SIGTERM)
    assert "stopped at once by SIGTERM" in line
    assert find_resumable(output, notify=pytest.fail) == output / "checkpoints" / "step-00000002"


def test_user_is_told_that_a_signal_was_heard() -> None:
    told, heard = [], threading.Event()

    def notify(text: str) -> None:
        told.append(text)
        heard.set()

    with StopSignals(notify) as stop, stop.deferred():
        signal.raise_signal(signal.SIGINT)
        assert heard.wait(10)
    assert told == ["SIGINT: stopping after this step, with a checkpoint. Once more: at once, without."]


def test_signals_do_afterwards_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted), StopSignals():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- full disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fill_disk() -> Iterator[Callable[[], None]]:
    """From the call on no file can grow beyond 100 kB: real writes fail, in the middle, with a real error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_saving_leaves_the_checkpoint_before(
    inputs: Inputs, run: Tune, tmp_path: Path, after_step: AfterStep, fill_disk: Callable[[], None]
) -> None:
    output = tmp_path / "out"
    after_step(2, fill_disk)
    line = error_line(run(inputs.arguments(output, "--save-every", "1")))
    assert "File too large" in line
    directory = find_resumable(output, notify=pytest.fail)
    assert directory == output / "checkpoints" / "step-00000001"
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000001"]


def test_full_disk_while_writing_the_model_leaves_the_model_before(
    inputs: Inputs, run: Tune, tmp_path: Path, fill_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before = tmp_path / "out", tmp_path / "before"
    for place in (output, before):
        succeed(run(inputs.arguments(place)))
    tell = TrainingProgress.phase

    def phase(self: TrainingProgress, text: str, fraction: float | None = None) -> None:
        tell(self, text, fraction)
        if text == "writing the model":
            fill_disk()

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "phase", phase)
        assert "File too large" in error_line(run(inputs.arguments(output, "--steps", "6", "--resume")))
    assert same_weights(output, before)
    AutoModelForCausalLM.from_pretrained(output)
    assert len(report(output)["steps"]) == 4
    assert find_resumable(output, notify=pytest.fail) == output / "checkpoints" / "step-00000006"
    assert not (output / ".writing").exists()
