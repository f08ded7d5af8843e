"""``isthmus testbed up`` and ``down``: from what was typed to a standing, measured, printed testbed, or to none."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from isthmus.spec.files import atomic_write
from isthmus.spec.serialization import to_json
from isthmus.spec.testbed import TestbedSpec
from isthmus.spec.units import parse_seconds
from isthmus.testbed.asking import parse_devices
from isthmus.testbed.processes import stop_signals
from isthmus.testbed.table import testbed_table
from isthmus.testbed.testbed import Testbed, remove_testbed


def set_up(
    *,
    name: str,
    devices: int | None,
    device: Sequence[str] | None,
    cpu: str | None,
    bandwidth: str | None,
    memory: str | None,
    delay: str | None,
    quota: str,
    subnet: str | None,
    replace: bool,
    measure: bool,
    report: Path | None,
) -> None:
    """Sets up what the options of the command line ask for, measures it, writes ``report`` and prints the table.

    On any error, Ctrl-C, SIGTERM and SIGHUP nothing of it stays. Raises as ``parse_devices``, ``Testbed.up`` and
    ``Testbed.measure`` do, and ``OSError`` when the report cannot be written.
    """
    defaults = {"cpu": cpu, "bandwidth": bandwidth, "memory": memory, "delay": delay}
    given = {key: value for key, value in defaults.items() if value is not None}
    spec = TestbedSpec(
        name=name,
        devices=parse_devices(devices, device or (), given),
        subnet=subnet,
        cpu_quota_s=parse_seconds(quota, "quota"),
    )
    with ended_by_signals(), contextlib.ExitStack() as undo:
        standing = Testbed.up(spec, replace=replace)
        undo.callback(standing.down)
        if measure:
            with Console(stderr=True).status("measuring") as status:
                standing.measure(lambda text: status.update(f"measuring: {text}"))
        if report is not None:
            atomic_write(report, to_json(standing.report))
        undo.pop_all()
    Console().print(testbed_table(standing.state))


def take_down(name: str) -> None:
    """Removes all of the testbed ``name`` and says whether there was any. Raises as ``remove_testbed`` does."""
    with ended_by_signals():
        was_there = remove_testbed(name)
    print(f"testbed {name}: {'removed' if was_there else 'there was none'}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Signals that ask to end raise an exception in the block, so that it cleans up."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
