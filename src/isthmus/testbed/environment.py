"""The environment of a command on a device: what ``torchrun`` would set, threads and the interface. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isthmus.testbed.layout import DEVICE_LINK
from isthmus.testbed.limits import num_threads
from isthmus.testbed.state import TestbedState


def device_environment(
    state: TestbedState, devices: Sequence[int], rank: int, base: Mapping[str, str], master_port: int
) -> dict[str, str]:
    """``base`` with the variables of the command that runs on ``devices[rank]``.

    ``OMP_NUM_THREADS`` is the device's number of cores, rounded up, unless ``base`` has it.
    """
    device = devices[rank]
    threads = {"OMP_NUM_THREADS": str(num_threads(state.spec.devices[device]))}
    return {
        **threads,
        **base,
        "RANK": str(rank),
        "WORLD_SIZE": str(len(devices)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": state.layout.address(devices[0]),
        "MASTER_PORT": str(master_port),
        "ISTHMUS_DEVICE": str(device),
        "GLOO_SOCKET_IFNAME": DEVICE_LINK,
    }
