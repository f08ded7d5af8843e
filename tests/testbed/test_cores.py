"""isthmus.testbed.cores: devices share cores as evenly as they fit, and stay there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from isthmus.spec.testbed import DeviceSpec
from isthmus.testbed.cores import cores_for, keep_on, usable_cores


def devices(*shares: float) -> list[DeviceSpec]:
    return [DeviceSpec(cpu_share=share, bandwidth_bits_per_s=1e9) for share in shares]


@pytest.mark.parametrize(
    ("shares", "taken", "expected"),
    [
        ((0.45, 0.45, 0.45, 0.45), (0, 0), (0, 1, 0, 1)),
        ((0.45, 0.45), (0, 0, 0), (0, 1)),
        ((0.2, 0.45, 0.6), (0, 0), (1, 1, 0)),
        ((0.1,) * 10, (0,), (0,) * 10),
        ((0.45,), (0.5, 0.2), (1,)),
        ((1.0, 1.0), (0, 0), (0, 1)),
        # No room on one core each.
        ((0.2, 0.45, 0.6, 0.6), (0, 0), ()),
        ((1.5,), (0, 0), ()),
        ((0.45,), (0.6, 0.6), ()),
    ],
)
def test_devices_are_where_least_is_taken_or_anywhere(
    shares: tuple[float, ...], taken: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    assert cores_for(devices(*shares), dict(enumerate(taken))) == expected


def test_of_cores_that_are_taken_alike_the_first_come_first() -> None:
    assert cores_for(devices(0.5, 0.5), {0: 0.0, 2: 0.0, 1: 0.0, 3: 0.0}) == (0, 2)


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, [0, 2, 1, 3]),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_one_of_every_physical_core_comes_first(
    siblings: dict[int, str], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in siblings.items():
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 2, 1, 0})
    assert usable_cores(tmp_path) == expected


def test_what_runs_is_moved_and_what_has_ended_is_passed_over() -> None:
    core = usable_cores()[-1]
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            keep_on([process.pid, 2**22 - 1], [core])
            assert os.sched_getaffinity(process.pid) == {core}
        finally:
            process.kill()
    keep_on([process.pid], [core])
