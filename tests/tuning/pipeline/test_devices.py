"""Which GPU each process takes, on hosts whose GPUs and buses are played: no GPU is needed, and none was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tuning.pipeline.test_company import Played

from isthmus.profiling.pcie import pci_root
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import RankDevice
from isthmus.tuning.pipeline import devices
from isthmus.tuning.pipeline.devices import (
    carry_by_nccl,
    devices_of_all,
    prepare_for_nccl,
    take_device,
    told_devices,
)

TWO_SWITCHES = [0x1A, 0x1B, 0x3C, 0x3D]
"""Buses of four GPUs, two behind a switch each, in the order in which they are found."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


class Host:
    """Two switches, each behind a root port, with two GPUs each."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        for bus in TWO_SWITCHES:
            port = "pci0000:17/0000:17:00.0" if bus < 0x20 else "pci0000:3a/0000:3a:00.0"
            device = folder / "devices" / port / f"0000:{bus - 2:02x}:00.0" / f"0000:{bus:02x}:00.0"
            device.mkdir(parents=True)
            (folder / device.name).symlink_to(device)
        monkeypatch.setattr(devices, "pci_root", lambda address: pci_root(address, folder))
        self.current: list[int] = []
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)
        self.shows(TWO_SWITCHES)

    def shows(self, buses: Sequence[int]) -> None:
        """Processes see these GPUs, as with CUDA_VISIBLE_DEVICES."""

        def properties(number: int) -> Any:
            return SimpleNamespace(pci_domain_id=0, pci_bus_id=buses[number], pci_device_id=0)

        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(buses))
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: len(buses))
        self.monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    def taken(self, num_processes: int, local_world_size: int | None = None) -> list[RankDevice | None]:
        """By each of so many processes."""
        found = []
        for rank in range(num_processes):
            self.monkeypatch.setenv("LOCAL_RANK", str(rank))
            if local_world_size is None:
                self.monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
            else:
                self.monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world_size))
            found.append(take_device(rank))
        return found

    def numbers(self, num_processes: int, local_world_size: int | None = None) -> list[int]:
        self.current.clear()
        taken = self.taken(num_processes, local_world_size)
        assert [one.number for one in taken if one] == self.current
        return list(self.current)


def test_neighbours_take_gpus_under_different_roots(host: Host) -> None:
    assert host.numbers(4, 4) == host.numbers(4) == [0, 2, 1, 3]
    assert host.numbers(2, 2) == [0, 2]
    taken = host.taken(4, 4)
    assert [one and one.root for one in taken] == ["0000:17:00.0", "0000:3a:00.0"] * 2
    assert taken[1] and taken[1].address == "0000:3c:00.0"


def test_only_gpus_that_processes_see_count(host: Host) -> None:
    host.shows([0x3D, 0x3C, 0x1A])
    assert host.numbers(3, 3) == [0, 2, 1]
    host.shows([0x3D, 0x3C])
    assert host.numbers(2, 2) == [0, 1]
    host.shows([0x1B])
    assert host.numbers(1, 1) == [0]


def test_gpus_are_taken_by_number_where_roots_are_not_known(host: Host) -> None:
    (host.folder / "0000:1b:00.0").unlink()
    assert host.numbers(4, 4) == [0, 1, 2, 3]
    host.monkeypatch.setattr(devices, "pci_root", lambda address: None)
    assert host.numbers(3, 3) == [0, 1, 2]


def test_fewer_gpus_than_processes_are_refused(host: Host) -> None:
    for local_world_size in (5, None):
        with pytest.raises(IsthmusError, match="accelerator: got 4 GPUs for 5 processes of this host, wanted one each"):
            host.taken(5, local_world_size)


def test_without_gpus_none_is_taken(host: Host) -> None:
    host.shows([])
    assert host.taken(2, 2) == [None, None] and not host.current


def test_all_know_which_gpu_each_takes(host: Host) -> None:
    mine, other = host.taken(2, 2)
    assert mine and other
    links = Played(0, [asdict(mine), None, asdict(other)])
    assert devices_of_all(mine, links) == (mine, other) and links.fact == asdict(mine)
    assert devices_of_all(None, links) == (mine, other) and links.fact is None
    assert told_devices([mine, other]) == "GPUs: rank 0 0 (PCIe root 0000:17:00.0), rank 1 2 (PCIe root 0000:3a:00.0)"
    unknown = RankDevice(rank=3, host="b", number=1, address="0000:01:00.0", root=None)
    assert told_devices([unknown]) == "GPUs: rank 3 1"


def test_nccl_is_refused_where_it_cannot_carry(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = host.taken(2, 2)
    assert mine and other
    links = Played(0, [None] * 3)
    with pytest.raises(IsthmusError, match="backend: got nccl, but ranks 1, 2 without a GPU, wanted one each: say --b"):
        carry_by_nccl([mine], links)
    links = Played(0, [None] * 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(IsthmusError, match="backend: got nccl, but torch was built without it: say --backend gloo"):
        carry_by_nccl([mine, replace(other, rank=1)], links)

    def fails(*arguments: object) -> None:
        raise RuntimeError("Duplicate GPU detected\nmore")

    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(devices, "Channels", fails)
    links.timeout_s = 1.0
    with pytest.raises(IsthmusError, match="rank 0: NCCL could not connect all GPUs: Duplicate GPU detected; say --b"):
        carry_by_nccl([mine, replace(other, rank=1)], links)


def test_nccl_has_a_connection_for_each_stream_unless_somebody_says_else(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    for before, after in ((None, "32"), ("1", "1")):
        monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
        prepare_for_nccl()
        assert os.environ[name] == after
