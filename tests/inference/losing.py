"""One device's process for the tests that kill some: ``python -m tests.inference.losing MODEL DIRECTORY STRATEGY``.

The leader answers one request after the other until there is a file ``stop``, and writes a line for each: whether the
answer was that of one device alone, how many devices answered, and how long it took. The others follow.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import torch

from isthmus.inference.engine import Engine
from isthmus.inference.run import open_engine
from isthmus.spec.generation import GenerationSettings

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
ATTENDED = torch.ones_like(IDS, dtype=torch.bool)
SETTINGS = GenerationSettings(max_new_tokens=6, temperature=1.0, seed=3)
TIMEOUT_S = 60.0
"""Longer than any test waits: nothing may depend on it."""


def ask(engine: Engine) -> torch.Tensor:
    if engine.spec.is_decoder:
        return engine.generate_tokens(IDS, ATTENDED, SETTINGS)
    return engine.hidden(IDS, ATTENDED)


def main(model: Path, directory: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    wanted = ask(Engine(model)) if rank == 0 else torch.empty(0)
    with open_engine(str(model), strategy=strategy, timeout_s=TIMEOUT_S) as engine:
        (directory / f"pid-{rank}").write_text(str(os.getpid()))
        if not engine.is_leader:
            return engine.follow()
        with (directory / "answers").open("w") as answers:
            while not (directory / "stop").exists():
                start_s = time.monotonic()
                found = ask(engine)
                is_right = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
                answers.write(f"{is_right} {len(engine.plan.devices)} {time.monotonic() - start_s:.3f}\n")
                answers.flush()
                time.sleep(random.choice((0.0, 0.02)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
