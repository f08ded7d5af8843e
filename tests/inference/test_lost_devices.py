"""Devices that are killed: the others answer, the same as one device alone would, and nothing hangs."""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.killing import PATIENCE_S, Tally, accept_servers, kill_one_by_one, listening, started
from tests.inference.losing import Connection, Question, Round
from tests.inference.test_block_parallel import saved  # noqa: F401
from transformers import AutoModel, BertConfig

from isthmus.inference.engine import Engine
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.requirements import check_host
from isthmus.testbed.testbed import Testbed
from isthmus.transport.rendezvous import held_port

NUM_DEVICES = 4
REPOSITORY = Path(__file__).parents[2]
FOREVER_S = 1000.0
"""Longer than any test waits: nothing may depend on it."""
JOINING_S = 20.0
MIB = 1 << 20
Saved = Callable[[str, str], Path]


@cache
def questions(model: Path) -> tuple[Question, ...]:
    """What is asked of the model, and one device's answers."""
    ids = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    with Engine(model) as engine:
        attended[1, slice(5) if engine.spec.is_decoder else slice(19, None)] = 0
        asked: dict[str, Any] = {"ids_BT": ids.tolist(), "attended_BT": attended.tolist()}
        found = [Question(**asked), Question(**asked, is_mean=True)]
        if engine.spec.is_decoder:
            greedy, drawn = (
                GenerationSettings(max_new_tokens=12),
                GenerationSettings(max_new_tokens=12, temperature=1.0, seed=3),
            )
            found = [Question(**asked, settings=greedy), Question(**asked, settings=drawn), found[0]]
        return tuple(question.answered_by(engine) for question in found)


@dataclass(frozen=True)
class Fleet:
    """A server for each device, and where they meet."""

    servers: Sequence[Connection]
    address: str
    port: int

    def round(self, model: Path, strategy: str, random_: random.Random, **options: Any) -> Round:
        return Round(
            num_devices=len(self.servers),
            address=self.address,
            port=self.port,
            model=str(model),
            strategy=strategy,
            questions=questions(model),
            seed=random_.getrandbits(32),
            **{"timeout_s": FOREVER_S, **options},
        )


def serving(directory: Path, num_devices: int) -> list[str]:
    """The command of a server."""
    code = "import sys; from tests.inference.losing import serve; serve(sys.argv[1], int(sys.argv[2]))"
    return [sys.executable, "-c", code, str(directory / "servers"), str(num_devices)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where servers connect to, with an environment for them."""
    directory = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(directory / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield directory


@pytest.fixture(scope="module")
def this_machine(directory: Path) -> Iterator[Fleet]:
    """Four devices without limits."""
    with listening(directory) as listener, held_port() as port:
        process = subprocess.Popen(serving(directory, NUM_DEVICES))
        try:
            servers = accept_servers(listener, NUM_DEVICES)
            yield Fleet(servers, "127.0.0.1", port)
            for server in servers:
                server.close()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def testbed(directory: Path) -> Iterator[Fleet]:
    """Four weak devices; none of their processes is left at the end."""
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6, memory_bytes=2048 * MIB)
    spec = TestbedSpec(name=f"t{secrets.token_hex(4)}", devices=(device,) * NUM_DEVICES)
    try:
        check_host(spec)
    except IsthmusError as error:
        pytest.skip(str(error))
    with Testbed.up(spec) as testbed, listening(directory) as listener:
        options = {"output": directory / "output", "timeout_s": 1800.0}
        running = threading.Thread(target=testbed.run, args=(serving(directory, 1),), kwargs=options)
        running.start()
        servers: list[Connection] = []
        try:
            servers = accept_servers(listener, NUM_DEVICES)
            yield Fleet(servers, testbed.state.layout.address(0), 29500)
        finally:
            for server in servers:
                server.close()
            running.join()
        assert not any(device.num_processes for device in testbed.status())


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 240 MiB that is worth dividing: 69 MiB of it on each of four devices, 126 on the busiest of three."""
    shape: dict[str, Any] = dict(hidden_size=512, num_hidden_layers=20, num_attention_heads=8, intermediate_size=2048)
    config = decoupled_config(BertConfig(vocab_size=99, **shape), {"num_sub_blocks": 4, "original_layers": [19]})
    directory = tmp_path_factory.mktemp("larger")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(directory)
    return directory


def serve_and_kill(
    fleet: Fleet, model: Path, strategy: str, random_: random.Random, tally: Tally, most: int = 3, **options: Any
) -> None:
    """One round: so many are killed that answer requests."""
    with started(fleet.servers, fleet.round(model, strategy, random_, **options)) as processes:
        if processes.following("answered"):
            kill_one_by_one(processes, random_, most)
        processes.end()
    processes.check(tally, is_memory_short="free_bytes" in options)


def kill_who_joins(
    fleet: Fleet, model: Path, strategy: str, random_: random.Random, tally: Tally, after_s: float | None
) -> None:
    """One round: one is killed until so long after all have met, or before (None)."""
    round_ = fleet.round(model, strategy, random_, timeout_s=JOINING_S, refresh=strategy == "auto")
    with started(fleet.servers, round_) as processes:
        if after_s is not None:
            processes.wait_until_met()
            time.sleep(random_.uniform(0, after_s))
        processes.kill(random_.randrange(1, NUM_DEVICES))
        processes.is_answered_again()
        processes.end()
    processes.check(tally)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_those_that_are_left_answer(family: str, saved: Saved, this_machine: Fleet) -> None:  # noqa: F811
    tally, random_ = Tally(), random.Random(1)
    for _ in range(2):
        serve_and_kill(this_machine, saved(family, "four"), "block", random_, tally)
    print(tally)
    assert tally.num_kills == 6 and tally.answers.keys() >= {1, 4}


@pytest.mark.long
@pytest.mark.xdist_group("kills")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_kills_on_the_testbed(seed: int, saved: Saved, larger: Path, testbed: Fleet) -> None:  # noqa: F811
    """25 with each seed: of those that join, of those that have too little memory without the one that is killed, and
    of others, also while they recover."""
    tally, random_ = Tally(), random.Random(seed)
    tiny = [saved(family, "four") for family in ("bert", "llama")]
    kill_who_joins(testbed, tiny[seed % 2], "block", random_, tally, None)
    kill_who_joins(testbed, tiny[seed % 2], "block", random_, tally, 0.1)
    kill_who_joins(testbed, larger, "auto", random_, tally, 12.0)
    for free_bytes in (118 * MIB, 200 * MIB):
        serve_and_kill(testbed, larger, "block", random_, tally, free_bytes=free_bytes)
    number = 0
    while tally.num_kills < 25:
        model, strategy = [(tiny[0], "block"), (tiny[1], "block"), (larger, "auto")][number % 3]
        serve_and_kill(testbed, model, strategy, random_, tally, min(3, 25 - tally.num_kills))
        number += 1
    print(tally)
    assert tally.refused["memory"] == 2 and tally.answers.keys() >= {1, 4}
