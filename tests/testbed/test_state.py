"""isthmus.testbed.state: what is written is read back, and what cannot be read says what to do."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceMeasurement, DeviceSpec, TestbedSpec
from isthmus.testbed import state
from isthmus.testbed.cgroups import Controller
from isthmus.testbed.state import TestbedState, forget_state, load_state, only_one_changes, save_state, state_file

STATE = TestbedState(
    spec=TestbedSpec(name="lab", devices=(DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6, memory_bytes=2**30),)),
    subnet="10.213.7.0/24",
    controllers={"cpu": Controller(version=1, parent="/sys/fs/cgroup/cpu")},
    measured=(
        DeviceMeasurement(
            to_host_bits_per_s=119e6, from_host_bits_per_s=118e6, round_trip_s=25e-6, cpu_share=0.32, gemm_flops=3e10
        ),
    ),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "FOLDER", tmp_path / "isthmus")
    return tmp_path / "isthmus"


def test_state_is_read_back_as_it_was_written() -> None:
    save_state(STATE)
    assert load_state("lab") == STATE
    assert STATE.layout.address(0) == "10.213.7.10"


def test_missing_state_names_the_testbeds_there_are() -> None:
    with pytest.raises(IsthmusError, match=r"name: no testbed 'lab' is up; set one up with `isthmus testbed up`"):
        load_state("lab")
    save_state(STATE)
    with pytest.raises(IsthmusError, match=r"name: no testbed 'other' is up; there are lab: choose with --name"):
        load_state("other")


@pytest.mark.parametrize("text", ["{", "{}", '{"schema_version": 99}'])
def test_state_that_cannot_be_read_says_how_to_get_rid_of_it(folder: Path, text: str) -> None:
    folder.mkdir()
    state_file("lab").write_text(text)
    with pytest.raises(
        IsthmusError, match=r"testbed-lab.json: .*remove the testbed with `isthmus testbed down --name lab`"
    ):
        load_state("lab")


def test_forgotten_state_is_gone_with_what_a_crash_left_of_it_and_no_other(folder: Path) -> None:
    save_state(STATE)
    for name in (".testbed-lab.json.0123abcd.tmp", "testbed-lab2.json"):
        (folder / name).write_text("")
    forget_state("lab")
    forget_state("lab")
    assert [path.name for path in folder.iterdir()] == ["testbed-lab2.json"]


def test_only_one_changes_at_a_time_and_the_folder_goes_with_the_last(folder: Path) -> None:
    inside: list[int] = []

    def change(number: int) -> None:
        for _ in range(20):
            with only_one_changes():
                inside.append(number)
                save_state(STATE)
                assert len(inside) == 1
                forget_state("lab")
                inside.remove(number)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not folder.exists()
    with only_one_changes():
        save_state(STATE)
    assert state_file("lab").exists()
