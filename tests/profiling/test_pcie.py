"""Where GPUs are on the bus, on hosts that are played by directories laid out as Linux has them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from isthmus.profiling.pcie import pci_address, pci_root

DIRECT = "pci0000:3a/0000:3a:00.0/0000:3b:00.0"
SWITCH = "pci0000:17/0000:17:01.1/0000:18:00.0"
"""Its port towards the root; behind it there is a port for each device."""
HYPER_V = "LNXSYSTM:00/LNXSYBUS:00/ACPI0004:00/VMBUS:00/47505500-0001/pci0001:00/0001:00:00.0"


class Properties(NamedTuple):
    """As torch has them."""

    pci_domain_id: int
    pci_bus_id: int
    pci_device_id: int


def played(sys: Path, *paths: str) -> Path:
    """The folder of all devices, by address, of a /sys with devices at these paths."""
    devices = sys / "bus/pci/devices"
    devices.mkdir(parents=True, exist_ok=True)
    for path in paths:
        folder = sys / "devices" / path
        folder.mkdir(parents=True)
        (devices / folder.name).symlink_to(Path("../../../devices") / path)
    return devices


def test_an_address_is_written_as_linux_does() -> None:
    assert pci_address(Properties(0, 0xDC, 5)) == "0000:dc:05.0"
    assert pci_address(Properties(0x10000, 1, 31)) == "10000:01:1f.0"


def test_devices_of_a_switch_have_one_root_and_ports_of_a_bridge_are_two(tmp_path: Path) -> None:
    devices = played(
        tmp_path,
        f"{SWITCH}/0000:19:04.0/0000:1a:00.0",
        f"{SWITCH}/0000:19:08.0/0000:1b:00.0",
        "pci0000:17/0000:17:03.1/0000:1c:00.0",
        DIRECT,
    )
    roots = [pci_root(address, devices) for address in ("0000:1a:00.0", "0000:1b:00.0", "0000:1c:00.0", "0000:3b:00.0")]
    assert roots == ["0000:17:01.1", "0000:17:01.1", "0000:17:03.1", "0000:3a:00.0"]


def test_devices_of_virtual_machines_are_roots_of_their_own(tmp_path: Path) -> None:
    devices = played(tmp_path, "pci0000:00/0000:00:1e.0", "pci0000:00/0000:00:1f.0", HYPER_V)
    for address in ("0000:00:1e.0", "0000:00:1f.0", "0001:00:00.0"):
        assert pci_root(address, devices) == address


def test_what_cannot_be_seen_is_not_known(tmp_path: Path) -> None:
    devices = played(tmp_path, "platform/soc/0000:01:00.0")
    assert pci_root("0000:01:00.0", devices) is None
    assert pci_root("0000:02:00.0", devices) is None
    (devices / "0000:03:00.0").symlink_to("0000:03:00.0")  # leads nowhere
    assert pci_root("0000:03:00.0", devices) is None
    assert pci_root("0000:01:00.0", tmp_path / "none") is None


@pytest.mark.skipif(not Path("/sys/bus/pci/devices").is_dir(), reason="shows no PCI devices")
def test_every_device_of_this_host_has_a_root() -> None:
    addresses = [path.name for path in Path("/sys/bus/pci/devices").iterdir()]
    roots = [pci_root(address) for address in addresses]
    assert all(root is not None and Path("/sys/bus/pci/devices", root).exists() for root in roots)
