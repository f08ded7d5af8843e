"""Devices by name and from a file: what is there, what a file may leave out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.simulation.devices import KINDS, devices_of, kind, read_devices
from isthmus.spec.cluster import MAX_DEVICES
from isthmus.spec.errors import IsthmusError

OWN: dict[str, object] = {
    "name": "laptop",
    "flops_per_s": {"fp32": 4e10},
    "memory_bytes_per_s": 1e10,
    "memory_bytes": 4 << 30,
    "bits_per_s": 1e8,
    "round_trip_s": 3e-3,
}
PI: dict[str, object] = {"name": "pi", "kind": "raspberry-pi-4b"}


def write(folder: Path, *devices: dict[str, object]) -> Path:
    path = folder / "hardware.json"
    path.write_text(json.dumps({"schema_version": 1, "devices": devices}))
    return path


def test_a_file_names_devices_by_kind_and_changes_what_differs(tmp_path: Path) -> None:
    found = read_devices(write(tmp_path, OWN, PI | {"count": 2, "bits_per_s": 25e6}))
    assert [device.name for device in found] == ["laptop", "pi-1", "pi-2"]
    assert found[1].flops_per_s == kind("raspberry-pi-4b").flops_per_s and found[1].bits_per_s == 25e6
    assert found[0].flops_per_s == {"fp32": 4e10} and not found[0].is_wireless


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([{"name": "a"}], "bits_per_s: a has none, wanted bits_per_s, flops_per_s, memory_bytes, .* or a kind"),
        ([{"name": "a", "kind": "pi"}], "device: got 'pi', wanted one of raspberry-pi-4b, raspberry-pi-5, "),
        ([PI, PI], "name: 'pi' is there twice"),
        ([PI | {"count": 2}, PI | {"name": "pi-2"}], "name: 'pi-2' is there twice"),
        ([PI | {"count": 0}], "count: pi has 0, wanted 1 or more"),
        ([PI | {"count": MAX_DEVICES}, OWN], f"devices: got {MAX_DEVICES + 1}, wanted 1 to {MAX_DEVICES}"),
        ([], f"devices: got 0, wanted 1 to {MAX_DEVICES}"),
        ([OWN | {"bits_per_s": 0}], "bits_per_s: laptop has 0.0, wanted more than 0"),
        ([OWN | {"memory_bytes": -1}], "memory_bytes: laptop has -1, wanted more than 0"),
        ([OWN | {"round_trip_s": -1e-3}], "round_trip_s: laptop has -0.001, wanted 0 or more"),
        ([OWN | {"flops_per_s": {"fp64": 1e9}}], "flops_per_s: laptop has fp64, wanted some of fp32, bf16, int8"),
        ([OWN | {"flops_per_s": {}}], "flops_per_s: laptop has none, wanted some of fp32"),
        ([OWN | {"flops_per_s": {"fp32": -1e9}}], r"flops_per_s\['fp32'\]: laptop has -1000000000.0, wanted more"),
        ([OWN | {"gflops": 3}], "unknown fields gflops"),
    ],
)
def test_what_contradicts_itself_is_refused_with_file_and_field(
    devices: list[dict[str, object]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(IsthmusError, match=f"cluster: .*hardware.json: .*{message}"):
        read_devices(write(tmp_path, *devices))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"cluster: cannot read .*none.json: No such file"):
        read_devices(tmp_path / "none.json")


def test_names_give_one_device_each_or_many_of_one() -> None:
    assert [device.name for device in devices_of(["raspberry-pi-5", "laptop-wifi5"], None)] == [
        "raspberry-pi-5",
        "laptop-wifi5",
    ]
    assert devices_of(["raspberry-pi-5"], 64) == (KINDS["raspberry-pi-5"],) * 64
    with pytest.raises(IsthmusError, match="num_devices: got 3 for 2 names"):
        devices_of(["raspberry-pi-5", "laptop-wifi5"], 3)
    with pytest.raises(IsthmusError, match="devices: got 65, wanted 1 to 64"):
        devices_of(["raspberry-pi-5"], 65)
    with pytest.raises(IsthmusError, match="device: got 'cray', wanted one of raspberry-pi-4b"):
        devices_of(["cray"], 4)
