"""The machine that this runs on, as a cluster to plan for: by its cached profile, or measured now."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from rich.console import Console

from isthmus.planning.memory import Blueprint
from isthmus.simulation.tuning.machine import cluster_of
from isthmus.spec.errors import IsthmusError
from isthmus.spec.profile import Profile
from isthmus.spec.tune_cluster import TuneCluster
from isthmus.tuning.profile import profile

BUDGET_SHARE = 0.9
"""Of a GPU's memory, as ``isthmus tune`` takes by itself."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Which accelerator of this machine, as ``isthmus tune`` has it, and how many processes share the machine."""

    accelerator: str = "auto"
    emulate: str | None = None
    memory_bytes: int | None = None
    num_processes: int = 1
    num_stages: int | None = None

    def check(self) -> None:
        """Raises ``IsthmusError`` where there is none to plan for."""
        is_emulated = self.accelerator == "emulated" or (self.accelerator == "auto" and self.emulate is not None)
        if is_emulated and (self.emulate is None or self.memory_bytes is None):
            raise IsthmusError(
                "accelerator: emulated needs --emulate h2d=2GB/s,d2h=2GB/s and --accelerator-memory 8GiB, or the like"
            )
        if not is_emulated and self.accelerator != "host" and not torch.cuda.is_available():
            raise IsthmusError(
                "cluster: got none, and this machine has no GPU to plan for; give --cluster FILE or NAME (see README), "
                "--accelerator host, or --emulate h2d=2GB/s,d2h=2GB/s with --accelerator-memory 8GiB"
            )


def this_machine(
    model: str, blueprint: Blueprint, options: MachineOptions, *, seq_len: int, micro_batch_size: int, num_batches: int
) -> tuple[TuneCluster, Profile]:
    """Measures, for seconds, what was not measured before with this model and these sizes, without its weights."""
    options.check()
    measured = profile(
        model,
        dtype=blueprint.dtype,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        micro_batches=num_batches,
        accelerator=options.accelerator,
        emulate=options.emulate,
        num_processes=options.num_processes,
        num_stages=options.num_stages,
        console=Console(quiet=True),
    )
    memory_bytes = options.memory_bytes
    if measured.hardware.link is None:
        memory_bytes = psutil.virtual_memory().total // options.num_processes
    elif memory_bytes is None:
        memory_bytes = int(BUDGET_SHARE * torch.cuda.mem_get_info()[0])
    cluster = cluster_of(
        measured,
        blueprint.spec,
        num_tokens=blueprint.num_tokens,
        seq_len=seq_len,
        memory_bytes=memory_bytes,
        num_processes=options.num_processes,
    )
    return cluster, measured
