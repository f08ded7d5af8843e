"""Measures what a standing testbed really does: its links from the host, messages between devices, FP32 products."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceMeasurement
from isthmus.testbed import probe
from isthmus.testbed.limits import num_threads
from isthmus.testbed.processes import Place, start
from isthmus.testbed.state import TestbedState

_SENDING_S = 0.7
_COMPUTING_S = 0.7
_NUM_MESSAGES = 200
# For a link on which even little takes long; what is measured takes about a second otherwise.
_TIMEOUT_S = 120
# -P: the script's folder holds modules of ours, which must not stand in for others' of the same name.
_PROBE = (sys.executable, "-P", probe.__file__)


def measure(state: TestbedState, places: list[Place], tell: Callable[[str], None]) -> tuple[DeviceMeasurement, ...]:
    """Measures the devices, one after the other while the others are idle; takes about 3 s for each.

    ``places`` are those of all devices, in their order, each with a group that is there; who calls removes the groups,
    and with them the processes. ``tell`` is told what is measured next. Raises ``IsthmusError`` when a device cannot be
    reached or its probe ends early.
    """
    layout, numbers = state.layout, range(len(state.spec.devices))
    tell("loading PyTorch")
    with contextlib.ExitStack() as stack:
        gemm = stack.enter_context(_piped(_gemm_process()))
        for place in places:
            listening = [*_PROBE, "listen", layout.address(place.device), str(probe.PORT)]
            process = start(place, listening, os.environ, subprocess.PIPE, None)
            stack.enter_context(_piped(process))
            _read_line(process, f"device {place.device}")
        _read_line(gemm, "PyTorch")
        measured = []
        for number in numbers:
            tell(f"device {number} of {len(numbers)}")
            measured.append(_measure_device(state, number, places[number].run_group, gemm))
    return tuple(measured)


def _measure_device(state: TestbedState, number: int, group: Path, gemm: subprocess.Popen[bytes]) -> DeviceMeasurement:
    layout, spec = state.layout, state.spec.devices[number]
    address = layout.address(number)
    num_devices = len(state.spec.devices)
    # A quarter of a second's worth: enough for any link without delay, and soon sent over a slow one.
    buffer_bytes = round(min(max(spec.bandwidth_bits_per_s / 8 * (0.25 + spec.delay_s), 1 << 14), 1 << 22))
    with _reaching(address, number) as connection:
        probe.ask(connection, do="send", seconds=_SENDING_S, buffer_bytes=buffer_bytes)
        to_host_bits_per_s = probe.received_bits_per_s(connection)
    with _reaching(address, number) as connection:
        probe.ask(connection, do="receive")
        probe.send_for(connection, _SENDING_S, buffer_bytes)
        from_host_bits_per_s = json.loads(probe.read_line(connection))
    if num_devices > 1:
        with _reaching(address, number) as connection:
            peer = layout.address((number + 1) % num_devices)
            probe.ask(connection, do="exchange", address=peer, count=_NUM_MESSAGES)
            round_trip_s = json.loads(probe.read_line(connection))
    else:
        round_trip_s = probe.round_trip_s(address, _NUM_MESSAGES)
    request = {"groups": [str(group)], "num_threads": num_threads(spec), "seconds": _COMPUTING_S}
    assert gemm.stdin is not None
    gemm.stdin.write(json.dumps(request).encode() + b"\n")
    gemm.stdin.flush()
    return DeviceMeasurement(
        to_host_bits_per_s=to_host_bits_per_s,
        from_host_bits_per_s=from_host_bits_per_s,
        round_trip_s=round_trip_s,
        **json.loads(_read_line(gemm, "PyTorch")),
    )


@contextlib.contextmanager
def _reaching(address: str, device: int) -> Iterator[socket.socket]:
    try:
        with socket.create_connection((address, probe.PORT), timeout=_TIMEOUT_S) as connection:
            yield connection
    except OSError as error:
        filters = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
        hint = ""
        if filters.exists() and filters.read_text().strip() == "1":
            hint = " (does the host's firewall filter the bridge? sysctl net.bridge.bridge-nf-call-iptables=0)"
        raise IsthmusError(f"device {device}: measuring at {address} failed: {error}{hint}") from error


def _gemm_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([*_PROBE, "gemm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@contextlib.contextmanager
def _piped(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kills the process at the end and closes its pipes."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def _read_line(process: subprocess.Popen[bytes], who: str) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise IsthmusError(f"{who}: the probe ended early with exit code {process.wait()}; its own words are above")
    return line
