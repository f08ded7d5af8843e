"""One process or several that torchrun started: who is who, on which device, and who speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from isthmus.reporting.progress import TrainingProgress
from isthmus.spec.errors import IsthmusError


@contextmanager
def process_group() -> Iterator[int]:
    """This process's rank, with torch.distributed set up where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device_of(name: str) -> torch.device:
    """The device that ``cpu``, ``cuda`` or ``auto`` means for this process. Raises ``IsthmusError`` without a GPU."""
    if name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise IsthmusError(f"device: got {name!r}, wanted cpu, cuda or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise IsthmusError(f"device: got {name}, but PyTorch finds no GPU here; take --device cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device("cpu" if name == "auto" else name)


def progress_of(rank: int, title: str, num_steps: int | None, plain: bool | None) -> AbstractContextManager[Any]:
    """The run's progress on rank 0; the others say nothing."""
    return TrainingProgress(num_steps or 0, title=title, plain=plain) if rank == 0 else _Silent()


class _Silent(nullcontext):
    num_steps = 0

    def __enter__(self) -> _Silent:
        return self

    def phase(self, text: str, fraction: float | None = None) -> None: ...
    def step(self, view: object) -> None: ...
    def evaluation(self, step: int, result: object) -> None: ...
    def message(self, text: str) -> None: ...
