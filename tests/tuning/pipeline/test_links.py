"""What one process sends, another gets, whatever its size: tensors together in one message, facts in one or two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from isthmus.tuning.pipeline.links import Form, Links

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


def exchange() -> None:
    """One of two processes. Both check what they get."""
    links = Links.connect(timeout_s=60.0)
    for fact in FACTS:
        assert links.gather([links.rank, fact], "a fact") == [[0, fact], [1, fact]]
    for tensors in (TENSORS, TENSORS[:1], TENSORS[1:2]):
        arrival = links.receive([Form(tuple(t.shape), t.dtype) for t in tensors], 1 - links.rank, 16, "tensors")
        assert not arrival.is_here()
        links.gather(None, "both wait")
        links.send(tensors, 1 - links.rank, 16, "tensors")
        for got, wanted in zip(arrival.wait(), tensors, strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)
        assert arrival.is_here()
        links.flush()
    links.close()


def test_facts_and_tensors_arrive_whole() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.tuning.pipeline.test_links"]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)


if __name__ == "__main__":
    exchange()
