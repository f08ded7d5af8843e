"""What one process sends, another gets, whatever its size and whoever carries it: tensors together in one message,
facts in one or two. Two processes check it, as ``python -m tests.tuning.pipeline.test_links WHAT CARRIER``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.tuning.pipeline.carriers.base import Carrier
from isthmus.tuning.pipeline.carriers.channels import Channels, pairs
from isthmus.tuning.pipeline.carriers.tagged import TaggedCarrier
from isthmus.tuning.pipeline.links import Form, Links, RankLost

ROOT = Path(__file__).parents[3]
FACTS = [
    None,
    "short",
    ["x" * size for size in (4084, 4085, 4086, 100_000)],
    *("y" * size for size in range(4084, 4092)),
]
TENSORS = [
    torch.arange(3, dtype=torch.uint8),
    torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
    torch.arange(7, dtype=torch.bfloat16).view(1, 7),
    torch.arange(4, dtype=torch.int64)[::2],
]
CARRIERS: dict[str, Callable[[Links], Carrier]] = {
    "tagged": lambda links: TaggedCarrier(),
    # As with NCCL, which needs two GPUs: a communicator for each direction that knows no tags.
    "channels": lambda links: Channels(torch.device("cpu"), links.timeout_s, backend="gloo"),
}


def facts(links: Links) -> None:
    for fact in FACTS:
        assert links.gather([links.rank, fact], "a fact") == [[0, fact], [1, fact]]


def tensors(links: Links) -> None:
    other = 1 - links.rank
    for sent in (TENSORS, TENSORS[:1], TENSORS[1:2]):
        arrival = links.receive([Form(tuple(t.shape), t.dtype) for t in sent], other, 16, "tensors")
        assert not arrival.is_here()
        links.gather(None, "both wait")
        links.send(sent, other, 16, "tensors")
        for got, wanted in zip(arrival.wait(), sent, strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)
        assert arrival.is_here()
        links.flush()


def order(links: Links) -> None:
    """Both send much at once, before anybody asks, and take it the other way round; one tag twice."""
    other, tags = 1 - links.rank, [*range(16, 48), 16]
    big = 1 << 19
    for number, tag in enumerate(tags):
        links.send([torch.full((big,), float(number))], other, tag, "tensors")
    form = Form((big,), torch.float32)
    first, *others = (links.receive([form], other, tag, "tensors") for tag in tags)
    again = others.pop()
    deadline_s = time.monotonic() + 30
    while not first.is_here():
        assert time.monotonic() < deadline_s
    assert float(first.wait()[0].sum()) == 0.0
    for number, arrival in reversed([*enumerate(others, start=1)]):
        assert float(arrival.wait()[0].sum()) == number * big
    assert float(again.wait()[0].sum()) == (len(tags) - 1) * big
    links.flush()


def lost(links: Links) -> None:
    """Rank 1 ends; who waits for it says so, whatever it waits for."""
    if links.rank:
        links.send(TENSORS[:1], 0, 17, "tensors")
        links.flush()
        os._exit(0)
    assert torch.equal(links.receive([Form((3,), torch.uint8)], 1, 17, "tensors").wait()[0], TENSORS[0])
    with pytest.raises(RankLost, match=r"rank 0: waited for the news from rank 1: rank 1 has ended\."):
        links.receive([Form((3,), torch.uint8)], 1, 16, "the news").wait()
    os._exit(0)


def silent(links: Links) -> None:
    """Rank 1 says nothing for longer than the limit."""
    if links.rank:
        time.sleep(600)
    with pytest.raises(RankLost, match=r"waited for the news from rank 1: nothing came within 2 s\."):
        links.receive([Form((3,), torch.uint8)], 1, 16, "the news").wait()
    os._exit(0)


def other_length(links: Links) -> None:
    """Channels know how long a message is."""
    links.send(TENSORS[:1], 1 - links.rank, 16, "tensors")
    arrival = links.receive([Form((4,), torch.uint8)], 1 - links.rank, 16, "tensors")
    with pytest.raises(RankLost, match=r"waited for tensors from rank .: got 3 bytes, wanted 4\."):
        arrival.wait()
    links.flush()


CHECKS: dict[str, Callable[[Links], None]] = {
    check.__name__: check for check in (facts, tensors, order, lost, silent, other_length)
}


def two_processes(check: str, carrier: str, port: int) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.tuning.pipeline.test_links", check, carrier]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    awaited = ranks[:1] if check == "silent" else ranks
    said = []
    try:
        said = [process.communicate(timeout=120)[1] for process in awaited]
    finally:
        for process in ranks[len(said) :]:
            process.kill()
            process.communicate()
    assert [process.returncode for process in awaited] == [0] * len(awaited), "\n".join(said)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("facts", "other_length")])
def test_tensors_arrive_by_every_carrier(check: str, carrier: str, port: int) -> None:
    two_processes(check, carrier, port)


def test_facts_arrive_whole(port: int) -> None:
    two_processes("facts", "tagged", port)


def test_a_message_of_another_length_is_not_taken_for_ours(port: int) -> None:
    two_processes("other_length", "channels", port)


def test_channels_join_all_that_exchange_tensors() -> None:
    assert pairs(1) == []
    assert pairs(2) == [(0, 1), (1, 0)]
    found = pairs(5)
    assert len(found) == len(set(found)) == 2 * (4 + 3)
    for rank in range(5):
        assert {(rank, (rank + 1) % 5), ((rank + 1) % 5, rank)} <= set(found)
        assert not rank or {(0, rank), (rank, 0)} <= set(found)


if __name__ == "__main__":
    links = Links.connect(timeout_s=2.0 if sys.argv[1] == "silent" else 60.0)
    links.carry_tensors_by(CARRIERS[sys.argv[2]](links))
    CHECKS[sys.argv[1]](links)
    links.close()
