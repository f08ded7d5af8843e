"""Workers that are invited: real processes on loopback, one leader at a time, nothing left behind."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from isthmus.inference.engine import Engine
from isthmus.inference.joining import WORKER_PORT, WorkerAddress, invite, parse_devices
from isthmus.inference.planned import Wish, join
from isthmus.inference.worker import Worker
from isthmus.models.shards import ShardReader
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json

Checkpoint = Callable[[str], Path]
IDS = torch.tensor([[5, 6, 7, 8, 9]])
ATTENDED = torch.ones_like(IDS, dtype=torch.bool)


def wish(plan: InferencePlan | None) -> Wish:
    return Wish(request=InferenceRequest(num_tokens=5), plan=plan)


@contextmanager
def working(model: Path | None = None) -> Iterator[tuple[WorkerAddress, list[str]]]:
    """A worker that serves in a thread, at a free port, and what it tells."""
    lines: list[str] = []
    with Worker("127.0.0.1", 0, model=model, tell=lines.append) as worker:
        stopped = threading.Event()

        def serve() -> None:
            with pytest.raises((OSError, ValueError)):  # the closed listener
                worker.serve()
            stopped.set()

        threading.Thread(target=serve, daemon=True).start()
        yield WorkerAddress(host="127.0.0.1", port=worker.port), lines
        # Wakes the selector, which does not see that its socket was closed.
        worker._listener.shutdown(socket.SHUT_RDWR)
        assert stopped.wait(10)
    assert not [child for child in multiprocessing.active_children() if child.name == "isthmus-session"]


def wait_for(lines: list[str], text: str) -> None:
    deadline_s = time.monotonic() + 30
    while not any(text in line for line in lines):
        assert time.monotonic() < deadline_s, f"never told: {text}"
        time.sleep(0.01)


def test_a_leader_and_its_workers_give_what_one_device_gives(checkpoint: Checkpoint) -> None:
    model = checkpoint("bert")
    plan = InferencePlan.even("sequence", 2)
    digest = ShardReader(model).digest()
    wanted = Engine(model).hidden(IDS, ATTENDED)
    with working() as (address, lines):
        for _ in range(2):  # a worker can be invited again
            with invite([address], model=str(model), digest=digest, wish=wish(plan), timeout_s=60) as group:
                with join(ShardReader(model), wish(plan), group) as engine:
                    torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-5, atol=1e-5)
            wait_for(lines, "session ended")
            lines.clear()


def test_without_a_plan_leader_and_worker_make_one_together(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    model = checkpoint("bert")
    reader = ShardReader(model)
    with working() as (address, lines):
        with invite([address], model=str(model), digest=reader.digest(), wish=wish(None), timeout_s=60) as group:
            with join(reader, wish(None), group) as engine:
                found = engine.hidden(IDS, ATTENDED)
        torch.testing.assert_close(found, Engine(model).hidden(IDS, ATTENDED), rtol=1e-5, atol=1e-5)
        wait_for(lines, "session ended")


def test_a_worker_with_another_model_cannot_take_part(checkpoint: Checkpoint) -> None:
    model = checkpoint("bert")
    plan = InferencePlan.even("tensor", 2)
    with working(model=checkpoint("roberta")) as (address, _):
        with pytest.raises(IsthmusError, match=r"cannot take part: .* is another model"):
            invite([address], model=str(model), digest=ShardReader(model).digest(), wish=wish(plan), timeout_s=20)


def test_a_busy_worker_says_so(checkpoint: Checkpoint) -> None:
    model = checkpoint("bert")
    plan = InferencePlan.even("tensor", 2)
    digest = ShardReader(model).digest()
    with working() as (address, _):
        with invite([address], model=str(model), digest=digest, wish=wish(plan), timeout_s=60) as group:
            with pytest.raises(IsthmusError, match="busy with another leader"):
                invite([address], model=str(model), digest=digest, wish=wish(plan), timeout_s=20)
            with join(ShardReader(model), wish(plan), group):
                pass


def test_nobody_there_is_named(port: int) -> None:
    with pytest.raises(IsthmusError, match=rf"127\.0\.0\.1:{port} does not answer .* run `isthmus worker"):
        invite(
            [WorkerAddress(host="127.0.0.1", port=port)],
            model="m",
            digest="d",
            wish=wish(InferencePlan.even("tensor", 2)),
            timeout_s=5,
        )


def test_what_speaks_no_isthmus_is_dropped_and_the_next_is_served(checkpoint: Checkpoint) -> None:
    model = checkpoint("bert")
    plan = InferencePlan.even("tensor", 2)
    with working() as (address, lines):
        with socket.create_connection((address.host, address.port), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        wait_for(lines, "no invitation")
        digest = ShardReader(model).digest()
        with invite([address], model=str(model), digest=digest, wish=wish(plan), timeout_s=60) as group:
            with join(ShardReader(model), wish(plan), group):
                pass


def test_devices_are_read_and_own_addresses_stand_for_this_process() -> None:
    assert parse_devices("192.0.2.1, 192.0.2.2:1234,127.0.0.1") == [
        WorkerAddress(host="192.0.2.1", port=WORKER_PORT),
        WorkerAddress(host="192.0.2.2", port=1234),
    ]
    assert parse_devices("127.0.0.1:1234") == [WorkerAddress(host="127.0.0.1", port=1234)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("192.0.2.1,192.0.2.1", "is there twice"),
        ("192.0.2.1:http", "got port 'http'"),
        (" , ", "devices: got none"),
    ],
)
def test_bad_devices_are_refused(text: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        parse_devices(text)


def test_a_plan_survives_its_way_to_a_worker() -> None:
    plan = InferencePlan(strategy="sequence", devices=(0, 2), weights=(1.0, 2.5), codec="int8", dtype="bf16")
    assert from_json(InferencePlan, to_json(plan)) == plan
