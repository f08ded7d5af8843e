"""Devices that are killed: the others answer, the same as one device alone would, and nothing hangs."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.inference.test_block_parallel import saved  # noqa: F401

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.requirements import check_host
from isthmus.testbed.testbed import Testbed

NUM_DEVICES = 4
REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 120.0
Started = Callable[[list[str]], None]


def command(model: Path, directory: Path, strategy: str) -> list[str]:
    return [sys.executable, "-m", "tests.inference.losing", str(model), str(directory), strategy]


def wait_until(is_so: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"never {what}"
        time.sleep(0.01)


def answers(directory: Path) -> list[list[str]]:
    path = directory / "answers"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def kill_one_by_one(directory: Path, random_: random.Random, together: int = 1) -> int:
    """Kills all devices but the leader, in any order and at any moment; returns how many answers there were."""
    wait_until(lambda: len(answers(directory)) > 1, "an answer")
    left = list(range(1, NUM_DEVICES))
    random_.shuffle(left)
    while left:
        time.sleep(random_.uniform(0, 0.1))
        dying, left = left[:together], left[together:]
        before = len(answers(directory))
        for rank in dying:
            os.kill(int((directory / f"pid-{rank}").read_text()), signal.SIGKILL)
        wait_until(lambda wanted=before + 3: len(answers(directory)) >= wanted, f"an answer without device {dying}")
        assert int(answers(directory)[-1][1]) <= 1 + len(left)
    (directory / "stop").touch()
    found = answers(directory)
    assert {is_right for is_right, *_ in found} == {"True"}
    return len(found)


@contextmanager
def on_this_machine(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process for each device; gives the leader's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {"WORLD_SIZE": str(NUM_DEVICES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            argv, cwd=REPOSITORY, env={**os.environ, **variables, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(NUM_DEVICES)
    ]
    try:
        yield started[0]
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("family", "strategy", "together"),
    [("bert", "block", 1), ("bert", "auto", 1), ("llama", "block", 1), ("bert", "block", 2)],
)
def test_those_that_are_left_answer(
    family: str,
    strategy: str,
    together: int,
    saved: Callable[[str, str], Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    with on_this_machine(command(saved(family, "four"), tmp_path, strategy)) as leader:
        kill_one_by_one(tmp_path, random.Random(0), together)
        assert leader.wait(PATIENCE_S) == 0


@pytest.fixture
def testbed() -> Iterator[Testbed]:
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6)
    spec = TestbedSpec(name=f"t{secrets.token_hex(4)}", devices=(device,) * NUM_DEVICES)
    try:
        check_host(spec)
    except IsthmusError as error:
        pytest.skip(str(error))
    with Testbed.up(spec) as testbed:
        yield testbed


@pytest.mark.long
def test_a_hundred_kills_on_the_testbed(
    testbed: Testbed,
    saved: Callable[[str, str], Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    num_kills = 0
    while num_kills < 100:
        directory = tmp_path / str(num_kills)
        directory.mkdir()
        random_ = random.Random(num_kills)
        family, strategy = random_.choice(("bert", "llama")), random_.choice(("block", "block", "auto"))
        argv = command(saved(family, "four"), directory, strategy)
        # One that is killed is the first to fail; the others are to go on until they are told to stop.
        running = threading.Thread(
            target=testbed.run, args=(argv,), kwargs={"grace_s": 300.0, "timeout_s": 300.0, "output": directory}
        )
        running.start()
        try:
            kill_one_by_one(directory, random_, together=1 + (random_.random() < 0.1))
        finally:
            (directory / "stop").touch()
            running.join()
        num_kills += NUM_DEVICES - 1
