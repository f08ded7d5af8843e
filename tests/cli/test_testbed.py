"""``isthmus testbed``: what is typed reaches the testbed as meant, and how a run ended is the exit code."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from isthmus.cli.main import app
from isthmus.spec.errors import IsthmusError
from isthmus.spec.serialization import from_json
from isthmus.spec.testbed import DeviceMeasurement, DeviceSpec, TestbedReport, TestbedSpec
from isthmus.testbed.cgroups import Controller
from isthmus.testbed.processes import Interrupted, Outcome
from isthmus.testbed.state import TestbedState
from isthmus.testbed.testbed import DeviceStatus, Testbed

MEASURED = DeviceMeasurement(
    to_host_bits_per_s=119e6, from_host_bits_per_s=118e6, round_trip_s=25e-6, cpu_share=0.32, gemm_flops=30.5e9
)
ALIVE = DeviceStatus(has_namespace=True, has_link=True, has_groups=True, num_processes=3)


class FakeTestbed(Testbed):
    """Stands nowhere and notes what it is asked."""

    def __init__(self, spec: TestbedSpec) -> None:
        controllers = {"cpu": Controller(version=2, parent="/sys/fs/cgroup")}
        super().__init__(TestbedState(spec=spec, subnet="10.213.0.0/24", controllers=controllers))  # pyright: ignore
        self.asked: list[Any] = []
        self.outcome: Outcome | BaseException = Outcome(exit_codes={0: 0}, failed_device=None)
        self.statuses = (ALIVE,) * len(spec.devices)

    def measure(self, tell: Any = None) -> tuple[DeviceMeasurement, ...]:
        tell("device 0")
        self._state = dataclasses.replace(self._state, measured=(MEASURED,) * len(self._state.spec.devices))
        return self._state.measured

    def run(self, argv: Any, **options: Any) -> Outcome:
        self.asked.append((argv, options))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def status(self) -> tuple[DeviceStatus, ...]:
        return self.statuses

    def set_bandwidth(self, mbit_per_s: float, devices: Any = None) -> None:
        self.asked.append(("bandwidth", mbit_per_s, devices))

    def set_cpu(self, cpu_share: float, devices: Any = None) -> None:
        self.asked.append(("cpu", cpu_share, devices))

    def down(self) -> None:
        self.asked.append("down")


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> FakeTestbed:
    """What ``load`` finds under any name."""
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6)
    testbed = FakeTestbed(TestbedSpec(devices=(device, device)))
    monkeypatch.setattr(Testbed, "load", lambda name: testbed)
    return testbed


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FakeTestbed, bool]]:
    """What ``up`` sets up, and whether in place of another."""
    testbeds: list[tuple[FakeTestbed, bool]] = []

    def up(spec: TestbedSpec, *, replace: bool) -> FakeTestbed:
        testbeds.append((FakeTestbed(spec), replace))
        return testbeds[-1][0]

    monkeypatch.setattr(Testbed, "up", up)
    return testbeds


def testbed(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["testbed", *arguments], env={"COLUMNS": "200"}, terminal_width=120)


testbed.__test__ = False  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]


def test_up_sets_up_what_was_asked_and_prints_and_reports_what_was_measured(made: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    equal = ["--devices", "2", "--cpu", "0.45", "--bandwidth", "125mbit", "--memory", "2GiB", "--quota", "2ms"]
    result = testbed("up", *equal, "--name", "lab", "--replace", "--report", str(report))
    assert result.exit_code == 0
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6, memory_bytes=2 * 2**30)
    spec = TestbedSpec(name="lab", devices=(device, device), cpu_quota_s=0.002)
    [(standing, replaced)] = made
    assert (standing.state.spec, replaced, standing.asked) == (spec, True, [])
    for cell in ("10.213.0.11", "0.45", "0.32", "30.5", "2 GiB", "125", "119", "0.025"):
        assert cell in result.stdout
    assert from_json(TestbedReport, report.read_text()) == TestbedReport(asked=spec, measured=(MEASURED, MEASURED))


def test_uneven_devices_are_listed_one_by_one_and_need_not_be_measured(made: Any) -> None:
    result = testbed(
        "up", "--device", "cpu=0.2,bandwidth=60mbit", "--device", "cpu=1", "--bandwidth", "1gbit", "--no-measure"
    )
    assert result.exit_code == 0
    devices = made[0][0].state.spec.devices
    assert [(each.cpu_share, each.bandwidth_bits_per_s) for each in devices] == [(0.2, 60e6), (1.0, 1e9)]
    assert "GFLOP/s" not in result.stdout


def test_testbed_that_cannot_be_measured_does_not_stay(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise IsthmusError("device 0: measuring failed")

    monkeypatch.setattr(FakeTestbed, "measure", fail)
    result = testbed("up", "--devices", "1", "--cpu", "1", "--bandwidth", "1mbit")
    assert (result.exit_code, result.stderr) == (2, "error: device 0: measuring failed\n")
    assert made[0][0].asked == ["down"]


def test_status_is_whole_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6, memory_bytes=2 * 2**30, delay_s=0.0125)
    standing = FakeTestbed(TestbedSpec(devices=(device, device)))
    monkeypatch.setattr(Testbed, "load", lambda name: standing)
    standing.measure(lambda _: None)
    shown = CliRunner().invoke(app, ["testbed", "status"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 80
    words = ("device", "memory", "10.213.0.11", "FP32", "GFLOP/s", "30.5", "119", "118", "12.5", "0.025", "yes,")
    assert set(words) <= set(shown.split())


def test_a_device_that_was_killed_may_have_lacked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6, memory_bytes=420 * 2**20)
    standing = FakeTestbed(TestbedSpec(devices=(device, device)))
    monkeypatch.setattr(Testbed, "load", lambda name: standing)
    standing.outcome = Outcome(exit_codes={0: 143, 1: 137}, failed_device=1)
    result = testbed("run", "--", "true")
    assert result.exit_code == 137
    assert "exit code 137: killed, probably for taking more than its 420 MiB of memory\n" in result.stderr


def test_status_tells_what_is_gone_and_fails(standing: FakeTestbed) -> None:
    assert testbed("status").exit_code == 0
    standing.statuses = (ALIVE, dataclasses.replace(ALIVE, has_link=False, has_groups=False))
    result = testbed("status")
    assert result.exit_code == 1
    assert "no link, no control groups" in result.stdout


def test_run_passes_the_command_with_its_own_options(standing: FakeTestbed) -> None:
    options = ["--device", "1,0", "--timeout", "5", "--grace", "2", "--quiet-others"]
    for separator in (["--"], []):
        assert testbed("run", *options, *separator, "prog", "--device", "x", "-h").exit_code == 0
        argv, given = standing.asked.pop()
        assert argv == ["prog", "--device", "x", "-h"]
        assert (given["devices"], given["timeout_s"], given["grace_s"]) == ((1, 0), 5, 2)
        assert given["quiet_others"] is True


@pytest.mark.parametrize(
    ("outcome", "exit_code", "words"),
    [
        (Outcome(exit_codes={0: 0}, failed_device=None), 0, ""),
        (Outcome(exit_codes={0: 143, 1: 7}, failed_device=1), 7, "device 1 failed first, with exit code 7\n"),
        (Outcome(exit_codes={0: 143}, failed_device=None, has_timed_out=True), 124, "ended after 5 s\n"),
        (Interrupted(signal.SIGINT), 130, "ended by SIGINT; nothing of it is left\n"),
    ],
)
def test_end_of_a_run_is_the_exit_code(
    standing: FakeTestbed, outcome: Outcome | BaseException, exit_code: int, words: str
) -> None:
    standing.outcome = outcome
    result = testbed("run", "--timeout", "5", "--", "true")
    assert (result.exit_code, result.stderr) == (exit_code, words)


def test_limit_changes_what_was_named(standing: FakeTestbed) -> None:
    assert testbed("limit", "--bandwidth", "50mbit", "--cpu", "0.2", "--device", "1").exit_code == 0
    assert testbed("limit", "--bandwidth", "1gbit").exit_code == 0
    assert standing.asked == [("bandwidth", 50, (1,)), ("cpu", 0.2, (1,)), ("bandwidth", 1000, None)]
    result = testbed("limit")
    assert result.exit_code == 2
    assert "nothing to change" in result.stderr
