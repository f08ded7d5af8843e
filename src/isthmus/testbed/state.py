"""What is remembered of a standing testbed: one JSON file per testbed under ``/run/isthmus``, gone with it."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.testbed import DeviceMeasurement, TestbedSpec
from isthmus.testbed.cgroups import Controller, ControllerName
from isthmus.testbed.layout import Layout

FOLDER = Path("/run/isthmus")


@dataclass(frozen=True, kw_only=True)
class TestbedState:
    """A testbed as it was set up and limited last."""

    __test__ = False

    schema_version: int = 1
    spec: TestbedSpec
    subnet: str
    controllers: dict[ControllerName, Controller]
    cores: tuple[int, ...] = ()
    """Of the host, that each device stays on; empty: they may run on all."""
    measured: tuple[DeviceMeasurement, ...] = ()
    """Empty when nothing was measured since the limits were set."""

    @property
    def layout(self) -> Layout:
        return Layout(name=self.spec.name, subnet=ipaddress.IPv4Network(self.subnet))


def state_file(name: str) -> Path:
    return FOLDER / f"testbed-{name}.json"


def _names() -> list[str]:
    """Of all testbeds that have a state file."""
    return sorted(path.stem.removeprefix("testbed-") for path in FOLDER.glob("testbed-*.json"))


def standing(*, but: str) -> list[TestbedState]:
    """All testbeds that are known, without the one named ``but`` and without what cannot be read."""
    states = []
    for name in _names():
        if name != but:
            with contextlib.suppress(IsthmusError):
                states.append(load_state(name))
    return states


def save_state(state: TestbedState) -> None:
    """Writes the state in one step."""
    atomic_write(state_file(state.spec.name), to_json(state))


def load_state(name: str) -> TestbedState:
    """The state of the testbed ``name``. Raises ``IsthmusError`` when there is none or it cannot be read."""
    path = state_file(name)
    try:
        return from_json(TestbedState, path.read_text())
    except FileNotFoundError as error:
        others = ", ".join(_names())
        hint = f"there are {others}: choose with --name" if others else "set one up with `isthmus testbed up`"
        raise IsthmusError(f"name: no testbed {name!r} is up; {hint}") from error
    except ValueError as error:
        raise IsthmusError(f"{path}: {error}; remove the testbed with `isthmus testbed down --name {name}`") from error


def forget_state(name: str) -> None:
    """Removes the state file, and one that was being written in a crash. Does nothing when there is none."""
    for path in (state_file(name), *FOLDER.glob(f".testbed-{name}.json.*.tmp")):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one_changes() -> Iterator[None]:
    """Holds a lock among all processes that make, limit or remove testbeds. Waits for it."""
    # On the directory above, which stays: ours comes and goes with the testbeds.
    descriptor = os.open(FOLDER.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):  # it is not there, or another testbed's state is in it
            FOLDER.rmdir()
    finally:
        os.close(descriptor)
