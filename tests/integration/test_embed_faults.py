"""A device that dies or hangs in the middle of a request: the others end with an error that names it, in time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.inference.conftest import add_tokenizer, checkpoint  # noqa: F401

ISTHMUS = str(Path(sys.executable).parent / "isthmus")
NUM_DEVICES = 3
TIMEOUT_S = 4.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def strategy() -> str:
    return "auto"


@pytest.fixture
def devices(
    strategy: str,
    checkpoint: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that compute texts without an end in sight, all of them at work."""
    model = add_tokenizer(checkpoint("bert"))
    texts = tmp_path / "texts.txt"
    texts.write_text("one two three four five\n" * 200_000)
    ready = tmp_path / "ready"
    variables = {
        "WORLD_SIZE": str(NUM_DEVICES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--text-file", str(texts), "--timeout", str(TIMEOUT_S), "--output", str(ready)]
    options += ["--strategy", strategy, "--batch-size", "64" if strategy == "pipeline" else "1"]
    started = [
        subprocess.Popen(
            [ISTHMUS, "embed", str(model), *options],
            env={**os.environ, **variables, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_DEVICES)
    ]
    try:
        wait_until_at_work(started)
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def wait_until_at_work(processes: list[subprocess.Popen[str]]) -> None:
    """Until every process has a connection to every other."""
    deadline_s = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline_s and all(process.poll() is None for process in processes)
        if all(num_connections(process.pid) >= NUM_DEVICES - 1 for process in processes):
            return
        time.sleep(0.1)


def num_connections(pid: int) -> int:
    return sum(connection.status == "ESTABLISHED" for connection in psutil.Process(pid).net_connections("tcp"))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_with_an_error_that_names_it(
    victim: int, number: signal.Signals, devices: list[subprocess.Popen[str]]
) -> None:
    time.sleep(1)
    os.kill(devices[victim].pid, number)
    for rank, device in enumerate(devices):
        if rank != victim:
            _, errors = device.communicate(timeout=TIMEOUT_S + 30)
            assert device.returncode == 3, errors
            assert f"error: rank {victim} " in errors, errors


@pytest.mark.parametrize("strategy", ["pipeline"])
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_so_do_those_of_a_pipeline(victim: int, number: signal.Signals, devices: list[subprocess.Popen[str]]) -> None:
    test_the_others_end_with_an_error_that_names_it(victim, number, devices)
