"""Under which PCIe root a GPU is, as Linux tells: what it shares the way to the host's memory with."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Protocol

_DEVICES = Path("/sys/bus/pci/devices")
_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")


class PciProperties(Protocol):
    """Where a device is on the bus: a part of what ``torch.cuda.get_device_properties`` returns."""

    @property
    def pci_domain_id(self) -> int: ...

    @property
    def pci_bus_id(self) -> int: ...

    @property
    def pci_device_id(self) -> int: ...


def pci_address(properties: PciProperties) -> str:
    """As Linux writes it. Of a card that is several functions the GPU is the first."""
    bus = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
    return f"{bus}:{properties.pci_device_id:02x}.0"


def pci_root(address: str, devices: Path = _DEVICES) -> str | None:
    """The address of the root port through which the device at ``address`` reaches the host; None: not known, as where
    the system is not Linux, does not show its buses, or has no such device.

    The root port and not the host bridge above it, because lanes are the port's: what lies behind one, such as all
    devices of a switch, shares one link, while the ports of a bridge have a link each. A device that is on the bridge's
    own bus, as virtual machines show theirs, is its own root: what it shares with others cannot be seen.
    """
    try:
        parts = Path(os.path.realpath(devices / address, strict=True)).parts
    except OSError:
        return None
    for part, below in pairwise(parts):
        if _HOST_BRIDGE.fullmatch(part):
            return below
    return None
