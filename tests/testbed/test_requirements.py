"""isthmus.testbed.requirements: all that a host lacks is told at once, each with its remedy."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed import requirements
from isthmus.testbed.cgroups import Controller
from isthmus.testbed.requirements import check_host, check_root, controllers_for

DEVICE = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6)
SPEC = TestbedSpec(devices=(DEVICE,))
FULL = TestbedSpec(devices=(DEVICE, dataclasses.replace(DEVICE, memory_bytes=2**30, delay_s=0.001)))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A host that has everything, to take things from."""
    parent = Controller(version=2, parent=str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(requirements, "host_controllers", lambda wanted: dict.fromkeys(wanted, parent))
    monkeypatch.setattr(requirements, "fails", lambda *command: None)
    monkeypatch.setattr(requirements, "call", lambda *command: "")
    return monkeypatch


def complaints(spec: TestbedSpec) -> list[str]:
    with pytest.raises(IsthmusError, match=r"testbed: this host lacks what a testbed needs: ") as caught:
        check_host(spec)
    return str(caught.value).partition("needs: ")[2].split("; ")


def test_host_that_has_everything_passes(host: pytest.MonkeyPatch) -> None:
    assert list(check_host(SPEC)) == ["cpu"]
    assert list(check_host(FULL)) == ["cpu", "memory"]


def test_memory_is_needed_only_where_it_is_limited() -> None:
    assert (controllers_for(SPEC), controllers_for(FULL)) == (["cpu"], ["cpu", "memory"])


def test_all_that_is_missing_is_told_at_once(host: pytest.MonkeyPatch) -> None:
    host.setattr(os, "geteuid", lambda: 1000)
    host.setattr(shutil, "which", lambda tool: None if tool in ("ip", "tc") else tool)
    host.setattr(requirements, "host_controllers", lambda wanted: {})
    root, ip, tc, cpu, cpu_remedy, memory = complaints(FULL)
    assert root == "root (run with sudo)"
    assert ip == "ip is not installed (apt-get install iproute2)"
    assert tc == "tc is not installed (apt-get install iproute2)"
    assert cpu.startswith("no control group hierarchy has the cpu controller (") and "cgroup_disable" in cpu_remedy
    assert memory.startswith("no control group hierarchy has the memory controller (")


@pytest.mark.parametrize(
    ("part", "words", "message"),
    [
        (
            "netns",
            "Operation not permitted",
            "network namespaces: Operation not permitted (a container needs --privileged)",
        ),
        ("bridge", "Unknown device type", "bridges: Unknown device type (modprobe bridge)"),
        ("veth", "Unknown device type", "veth links: Unknown device type (modprobe veth)"),
        ("tbf", "qdisc kind is unknown", "limits on bandwidth: qdisc kind is unknown (modprobe sch_tbf)"),
        ("netem", "qdisc kind is unknown", "delays: the kernel has no netem (qdisc kind is unknown)"),
    ],
)
def test_feature_that_the_kernel_lacks_is_told_in_its_words(
    host: pytest.MonkeyPatch, part: str, words: str, message: str
) -> None:
    host.setattr(requirements, "fails", lambda *command: words if part in command else None)
    assert complaints(FULL)[0] == message
    # Who asks for no delay needs no netem.
    if part == "netem":
        assert "leave --delay out" in complaints(FULL)[1]
        check_host(SPEC)


def test_groups_that_cannot_be_written_are_told(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host.setattr(os, "access", lambda path, mode: False)
    assert complaints(SPEC) == [
        f"{tmp_path} cannot be written to (mount it writable",
        "a container needs --privileged)",
    ]


def test_probing_leaves_nothing_also_when_it_fails(host: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, ...]] = []
    host.setattr(requirements, "call", lambda *command: called.append(command))
    host.setattr(requirements, "fails", lambda *command: "no" if "veth" in command else None)
    complaints(SPEC)
    assert called == [("ip", "netns", "delete", f"isthmus.isthmus.probe{os.getpid()}")]


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(IsthmusError, match="testbed: limiting devices needs root; run it with sudo"):
        check_root("limiting devices")
