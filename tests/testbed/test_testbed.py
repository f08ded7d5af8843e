"""isthmus.testbed on this host: what stands is what was asked, and nothing outlives its testbed. Needs root."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.testbed import TestbedReport, TestbedSpec
from isthmus.testbed import cgroups, network
from isthmus.testbed.layout import DEVICE_LINK
from isthmus.testbed.state import state_file
from isthmus.testbed.testbed import Testbed, remove_testbed


def traces(name: str) -> list[str]:
    """All that carries the testbed's name on this host."""
    listed = subprocess.run(["ip", "-json", "link"], capture_output=True, check=True, text=True).stdout
    links = [link["ifname"] for link in json.loads(listed) if link["ifname"].startswith(name)]
    # os.walk, unlike glob, lets other tests' groups go while it looks.
    walked = (Path(folder, entry) for folder, names, _ in os.walk("/sys/fs/cgroup") for entry in names if name in entry)
    places = [*Path("/run/netns").glob(f"*{name}*"), *walked, *Path("/run").glob(f"isthmus/*{name}*")]
    return links + [str(path) for path in places]


def queue(testbed: Testbed, device: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The queueing disciplines of both ends of a device's link."""
    layout = testbed.state.layout
    host = ["tc", "-json", "qdisc", "show", "dev", layout.host_link(device)]
    inside = ["tc", "-n", layout.namespace(device), "-json", "qdisc", "show", "dev", DEVICE_LINK]
    ends = [json.loads(subprocess.check_output(command))[0] for command in (host, inside)]
    return ends[0], ends[1]


def group_value(testbed: Testbed, device: int) -> float:
    """Cores that the device's control group allows."""
    controller = testbed.state.controllers["cpu"]
    group = Path(controller.parent, testbed.state.layout.group(device))
    if controller.version == 2:
        quota, period = (group / "cpu.max").read_text().split()
    else:
        quota, period = ((group / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
    return int(quota) / int(period)


def test_standing_testbed_is_remembered_alive_and_gone_without_a_trace(spec: TestbedSpec) -> None:
    with Testbed.up(spec) as testbed:
        assert traces(spec.name)
        assert Testbed.load(spec.name).state == testbed.state
        assert testbed.state.spec == spec
        assert all(status.is_alive and status.num_processes == 0 for status in testbed.status())
    assert traces(spec.name) == []
    with pytest.raises(IsthmusError, match=rf"name: no testbed '{spec.name}' is up"):
        Testbed.load(spec.name)
    assert remove_testbed(spec.name) is False


def test_links_and_cores_are_limited_as_asked_and_anew(testbed: Testbed) -> None:
    for end in (*queue(testbed, 0), *queue(testbed, 1)):
        assert (end["kind"], end["root"], end["options"]["rate"]) == ("tbf", True, 50e6 / 8)
    assert group_value(testbed, 1) == pytest.approx(0.5)
    testbed.set_bandwidth(100)
    testbed.set_cpu(0.25, devices=[1])
    assert [end["options"]["rate"] for end in (*queue(testbed, 0), *queue(testbed, 1))] == [100e6 / 8] * 4
    assert [group_value(testbed, device) for device in (0, 1)] == pytest.approx([0.5, 0.25])
    devices = Testbed.load(testbed.state.spec.name).state.spec.devices
    assert [(device.cpu_share, device.bandwidth_bits_per_s) for device in devices] == [(0.5, 100e6), (0.25, 100e6)]


def test_impossible_limit_changes_nothing(testbed: Testbed) -> None:
    with pytest.raises(IsthmusError, match=r"device 0: cpu: got 1000, wanted"):
        testbed.set_cpu(1000)
    with pytest.raises(IsthmusError, match=r"device: got \[2\], wanted different ones of 0 to 1"):
        testbed.set_bandwidth(10, devices=[2])
    assert Testbed.load(testbed.state.spec.name).state == testbed.state


def test_failed_up_leaves_nothing(spec: TestbedSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    real = network.make_device

    def fail_at_the_second(layout: Any, device: int, asked: Any) -> None:
        real(layout, device, asked)
        if device == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(network, "make_device", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        Testbed.up(spec)
    assert traces(spec.name) == []


def test_second_up_is_refused_and_replace_replaces(testbed: Testbed) -> None:
    spec = testbed.state.spec
    with pytest.raises(IsthmusError, match=rf"name: a testbed '{spec.name}' is up.* down --name {spec.name}"):
        Testbed.up(spec)
    smaller = dataclasses.replace(spec, devices=spec.devices[:1])
    assert len(Testbed.up(smaller, replace=True).status()) == 1
    assert network.namespaces_of(spec.name) == [testbed.state.layout.namespace(0)]


def test_link_of_somebody_else_is_neither_used_nor_removed(spec: TestbedSpec) -> None:
    link = f"{spec.name}-0"
    subprocess.run(["ip", "link", "add", "name", link, "type", "bridge"], check=True)
    try:
        with pytest.raises(IsthmusError, match=rf"name: {link} is there and not isthmus's; choose another --name"):
            Testbed.up(spec)
        remove_testbed(spec.name)
        assert traces(spec.name) == [link]
    finally:
        subprocess.run(["ip", "link", "delete", "dev", link], check=True)


def test_two_testbeds_stand_side_by_side(testbed: Testbed) -> None:
    spec = dataclasses.replace(testbed.state.spec, name=testbed.state.spec.name[:-1] + "x")
    with Testbed.up(spec) as other:
        assert other.state.subnet != testbed.state.subnet
    assert all(status.is_alive for status in testbed.status())


def test_testbed_without_its_state_is_found_and_removed_with_what_runs_in_it(testbed: Testbed) -> None:
    name, layout = testbed.state.spec.name, testbed.state.layout
    state_file(name).unlink()
    in_group = subprocess.Popen(["sleep", "1000"])
    in_namespace = subprocess.Popen(["ip", "netns", "exec", layout.namespace(1), "sleep", "1000"])
    try:
        Path(testbed.state.controllers["cpu"].parent, layout.group(0), "cgroup.procs").write_text(str(in_group.pid))
        # It is in the namespace for sure only once it has become what it was to run there.
        while Path(f"/proc/{in_namespace.pid}/comm").read_text() != "sleep\n":
            assert in_namespace.poll() is None
        assert remove_testbed(name) is True
        assert (in_group.wait(60), in_namespace.wait(60)) == (-9, -9)
    finally:
        for process in (in_group, in_namespace):
            process.kill()
            process.wait()
    assert traces(name) == []


def test_half_a_testbed_is_told_and_refused(testbed: Testbed) -> None:
    network.remove_link(testbed.state.layout.host_link(1))
    status = testbed.status()
    assert [each.is_alive for each in status] == [True, False]
    assert status[1].has_namespace and not status[1].has_link
    with pytest.raises(IsthmusError, match=r"device 1: part of it is gone.* up --replace"):
        testbed.run(["true"])
    assert testbed.run(["true"], devices=[0]).exit_code == 0


def test_measuring_measures_every_device_and_leaves_none_busy(testbed: Testbed) -> None:
    told: list[str] = []
    measured = testbed.measure(told.append)
    assert told == ["loading PyTorch", "device 0 of 2", "device 1 of 2"]
    assert len(measured) == 2
    assert all(value > 0 for each in measured for value in dataclasses.asdict(each).values())
    assert all(status.num_processes == 0 for status in testbed.status())
    assert Testbed.load(testbed.state.spec.name).report == testbed.report
    assert from_json(TestbedReport, to_json(testbed.report)) == TestbedReport(
        asked=testbed.state.spec, measured=measured
    )
    testbed.set_cpu(0.4)
    assert testbed.report.measured == ()


def test_removing_reports_what_stays_and_goes_on(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    name = testbed.state.spec.name

    def fail(group: Path) -> None:
        raise IsthmusError(f"{group.name}: stuck")

    with monkeypatch.context() as patch:
        patch.setattr(cgroups, "remove_group", fail)
        with pytest.raises(
            IsthmusError, match=rf"not all of testbed '{name}' could be removed: isthmus.{name}.0: stuck"
        ):
            testbed.down()
        assert network.namespaces_of(name) == network.links_of(name) == []
    assert remove_testbed(name) is True
    assert traces(name) == []
