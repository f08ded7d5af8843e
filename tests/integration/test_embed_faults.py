"""A device that dies or hangs: without the first one the others end with an error that names it, in time; without
another one they go on and answer as before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tests.inference.conftest import add_tokenizer, checkpoint  # noqa: F401

from isthmus.inference.engine import Engine

ISTHMUS = str(Path(sys.executable).parent / "isthmus")
NUM_DEVICES = 3
TIMEOUT_S = 12.0
"""Also for all to come together, which takes seconds on a busy machine."""
PATIENCE_S = 120.0
TEXT = "one two three four five"
WITHOUT_END = 200_000
SECONDS_OF_WORK = 10_000
Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Path:  # noqa: F811
    return add_tokenizer(checkpoint("bert"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "vectors.jsonl"


@pytest.fixture
def start(model: Path, output: Path, tmp_path: Path, port: int) -> Iterator[Start]:
    """Starts a process for each device, and gives them once each is connected to every other."""
    started: list[subprocess.Popen[str]] = []

    def start(strategy: str, num_texts: int) -> list[subprocess.Popen[str]]:
        texts = tmp_path / "texts.txt"
        texts.write_text(f"{TEXT}\n" * num_texts)
        variables = {
            "WORLD_SIZE": str(NUM_DEVICES),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "ISTHMUS_CACHE": str(tmp_path / "cache"),
        }
        options = ["--text-file", str(texts), "--timeout", str(TIMEOUT_S), "--output", str(output)]
        options += ["--strategy", strategy, "--batch-size", "64"]
        started.extend(
            subprocess.Popen(
                [ISTHMUS, "embed", str(model), *options],
                env={**os.environ, **variables, "RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(NUM_DEVICES)
        )
        wait_until_at_work(started)
        return started

    try:
        yield start
    finally:
        for process in started:
            with process:  # which waits for it, and closes its pipe
                process.kill()


def wait_until_at_work(processes: list[subprocess.Popen[str]]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline_s
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        if all(num_connections(process.pid) >= NUM_DEVICES - 1 for process in processes):
            return
        time.sleep(0.1)


def num_connections(pid: int) -> int:
    return sum(connection.status == "ESTABLISHED" for connection in psutil.Process(pid).net_connections("tcp"))


def check_that_all_end(devices: list[subprocess.Popen[str]], lost: int) -> None:
    for rank, device in enumerate(devices):
        if rank != lost:
            _, errors = device.communicate(timeout=PATIENCE_S)
            assert device.returncode == 3, errors
            assert f"error: rank {lost} " in errors, errors


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_one_that_is_lost_while_devices_are_measured_ends_the_others(
    victim: int, number: signal.Signals, start: Start
) -> None:
    devices = start("auto", 1)
    time.sleep(1)
    os.kill(devices[victim].pid, number)
    check_that_all_end(devices, victim)


@pytest.mark.parametrize(("strategy", "number"), [("pipeline", signal.SIGKILL)])
def test_without_the_first_the_others_end_with_an_error_that_names_it(
    strategy: str, number: signal.Signals, start: Start
) -> None:
    devices = start(strategy, WITHOUT_END)
    time.sleep(1)
    os.kill(devices[0].pid, number)
    check_that_all_end(devices, 0)


@pytest.mark.parametrize(("strategy", "number"), [("pipeline", signal.SIGKILL), ("sequence", signal.SIGSTOP)])
def test_without_another_the_rest_answers(
    strategy: str, number: signal.Signals, start: Start, model: Path, output: Path
) -> None:
    devices = start(strategy, SECONDS_OF_WORK)
    time.sleep(0.5)
    os.kill(devices[1].pid, number)
    for device in (devices[0], devices[2]):
        _, errors = device.communicate(timeout=PATIENCE_S)
        assert device.returncode == 0, errors
        assert (device is devices[0]) == ("rank 1 lost; 2 devices are left" in errors)
    found = torch.tensor([json.loads(line)["embedding"] for line in output.read_text().splitlines()])
    [wanted] = Engine(model).embed([TEXT])
    torch.testing.assert_close(found, wanted.expand(SECONDS_OF_WORK, -1), rtol=1e-4, atol=1e-5)
