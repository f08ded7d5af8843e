"""Which GPU each process of a host takes: neighbours in the pipeline under different PCIe roots, since one loads its
next stage while the other does. And NCCL between them, where it is asked for."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict

import torch

from isthmus.planning.roots import order_by_roots
from isthmus.profiling.pcie import pci_address, pci_root
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import RankDevice
from isthmus.tuning.pipeline.carriers.channels import MAX_CONNECTIONS, Channels
from isthmus.tuning.pipeline.links import Links, first_line


def take_device(rank: int) -> RankDevice | None:
    """Makes the GPU current that is this process's; None without a GPU. Every process of a host takes another one: they
    see the same GPUs and roots, and each finds the same order by itself. Raises ``IsthmusError`` where GPUs are fewer
    than processes."""
    if not torch.cuda.is_available():
        return None
    num_devices = torch.cuda.device_count()
    place = int(os.environ.get("LOCAL_RANK", "0"))
    # Torchrun says how many there are; without it there may be as many as GPUs.
    num_processes = max(place + 1, int(os.environ.get("LOCAL_WORLD_SIZE", num_devices)))
    if num_processes > num_devices:
        raise IsthmusError(
            f"accelerator: got {num_devices} GPUs for {num_processes} processes of this host, wanted one each: start "
            "fewer processes, or say --accelerator host."
        )
    addresses = [pci_address(torch.cuda.get_device_properties(number)) for number in range(num_devices)]
    roots = [pci_root(address) for address in addresses]
    number = order_by_roots(roots, num_processes)[place]
    torch.cuda.set_device(number)
    return RankDevice(
        rank=rank, host=socket.gethostname(), number=number, address=addresses[number], root=roots[number]
    )


def devices_of_all(mine: RankDevice | None, links: Links) -> tuple[RankDevice, ...]:
    """Of those ranks that took one; the same on all."""
    told = links.gather(mine and asdict(mine), "which GPU it takes")
    return tuple(RankDevice(**fact) for fact in told if fact is not None)


def told_devices(devices: Sequence[RankDevice]) -> str:
    """In a few words, for people."""
    whose = [
        f"rank {one.rank} {one.number}" + (f" (PCIe root {one.root})" if one.root is not None else "")
        for one in devices
    ]
    return f"GPUs: {', '.join(whose)}"


def prepare_for_nccl() -> None:
    """Before CUDA begins."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(MAX_CONNECTIONS))


def carry_by_nccl(devices: Sequence[RankDevice], links: Links) -> None:
    """From now on tensors go from GPU to GPU. Blocks until all are connected. ``devices``: of the ranks that have one.

    Raises ``IsthmusError`` where a rank has none, where torch has no NCCL, or where it cannot connect them.
    """
    missing = sorted(set(range(links.size)) - {device.rank for device in devices})
    if missing:
        whose = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        raise IsthmusError(f"backend: got nccl, but {whose} without a GPU, wanted one each: say --backend gloo.")
    if not torch.distributed.is_nccl_available():
        raise IsthmusError("backend: got nccl, but torch was built without it: say --backend gloo.")
    try:
        links.carry_tensors_by(Channels(torch.device("cuda", torch.cuda.current_device()), links.timeout_s))
    except RuntimeError as error:
        raise IsthmusError(
            f"backend: rank {links.rank}: NCCL could not connect all GPUs: {first_line(error)}; say --backend gloo."
        ) from error
