"""Starts one process per device inside its limits, forwards what they print, and sees to it that all of them end."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from isthmus.testbed.cgroups import is_empty_within, processes_in, remove_group, signal_processes
from isthmus.testbed.state import FOLDER

# Enters the control groups before anything else runs, so that nothing of the command ever runs without its limits.
_ENTER = 'for group in $1; do echo $$ > "$group/cgroup.procs" || exit 126; done; shift; exec "$@"'
# In the namespace, /sys shows the device's links. The control groups stay in it, or a command could not see its limits.
# They are kept below $1 meanwhile, where only this command sees them.
_SHOW = (
    'mount --rbind /sys/fs/cgroup "$1" && mount -t sysfs sysfs /sys && mount --rbind "$1" /sys/fs/cgroup '
    '&& umount -l "$1" || exit 126; shift; exec "$@"'
)


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal; everything that it had started is gone. Not an error that is passed over."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"ended by {number.name}")
        self.exit_code = 128 + number


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is to run: a namespace, groups and cores. ``run_group`` is one of the groups, and holds nothing
    else."""

    device: int
    namespace: str
    groups: tuple[Path, ...]
    run_group: Path
    cores: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. ``exit_codes`` by device, 128 + N for signal N."""

    exit_codes: dict[int, int]
    failed_device: int | None
    """The first one whose process failed by itself. None: all ended well, or ``has_timed_out``."""
    has_timed_out: bool = False

    @property
    def exit_code(self) -> int:
        """0, that of the device which failed first, or 124 when the time was up, as ``timeout`` has it."""
        if self.failed_device is not None:
            return self.exit_codes[self.failed_device]
        return 124 if self.has_timed_out else 0


Output = int | None
"""A file descriptor, ``subprocess.DEVNULL``, ``subprocess.PIPE`` (forwarded with a prefix) or None (passed through)."""


def start(
    place: Place, argv: Sequence[str], environment: Mapping[str, str], stdout: Output, stderr: Output
) -> subprocess.Popen[bytes]:
    """Starts ``argv`` at ``place``, in a process group of its own, with nothing to read."""
    entering = ["sh", "-c", _ENTER, "isthmus", " ".join(map(str, place.groups))]
    entering += ["taskset", "--cpu-list", ",".join(map(str, place.cores))]
    entering += ["nsenter", f"--net=/run/netns/{place.namespace}"]
    entering += ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _SHOW, "isthmus", str(FOLDER)]
    return subprocess.Popen(
        [*entering, *argv],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
    )


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to end: SIGINT, SIGTERM and, unless ``nohup`` has it ignored, SIGHUP."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_ignored else [signal.SIGHUP])]


class StopSignals:
    """A context that only notes ``stop_signals``, for who waits to act on. Outside the main thread, where Python
    delivers no signals, it notes none."""

    def __init__(self) -> None:
        self.got: list[signal.Signals] = []
        self.wakes, self._wake = os.pipe()
        """A file descriptor that can be read from when there is another one in ``got``."""
        os.set_blocking(self._wake, False)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.wakes)
        os.close(self._wake)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.got.append(signal.Signals(number))
        os.write(self._wake, b"!")


class _Forwarder:
    """Copies whole lines from a pipe to a file descriptor, each with a prefix. Owns the pipe's reading end."""

    def __init__(self, source: int, target: int, prefix: bytes) -> None:
        self.source = source
        self._target = target
        self._prefix = prefix
        self._rest = b""
        os.set_blocking(source, False)

    def forward(self) -> bool:
        """Copies some of what is there; False when it was the last. ``BlockingIOError``: nothing is there."""
        data = os.read(self.source, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._write(lines)
        return bool(data)

    def finish(self) -> None:
        """Copies all that is left, a last line without its end included."""
        with contextlib.suppress(BlockingIOError):
            while self.forward():
                pass
        if self._rest:
            self._write([self._rest])
            self._rest = b""

    def _write(self, lines: list[bytes]) -> None:
        data = b"".join(self._prefix + line + b"\n" for line in lines)
        while data:
            data = data[os.write(self._target, data) :]


class Supervisor:
    """The processes of one run, from their start to the end of the last thing that they left behind.

    When one fails the others have ``grace_s`` to end by themselves; then they get SIGTERM, and ``grace_s`` later
    SIGKILL. When the time is up or this process is told to end they get SIGTERM at once; a second signal kills. A
    context: at its end nothing of the run is left, whatever happened.
    """

    def __init__(self, grace_s: float, timeout_s: float | None) -> None:
        self._grace_s = grace_s
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        self._next_signal: tuple[float, signal.Signals] | None = None
        self._groups: list[Path] = []
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._forwarders: list[_Forwarder] = []
        self._exit_codes: dict[int, int] = {}
        self._failed_device: int | None = None
        self._has_timed_out = False
        self._is_stopped = False
        self._selector = selectors.DefaultSelector()
        self._descriptors = contextlib.ExitStack()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as last_to_first:
            last_to_first.callback(self._descriptors.close)
            last_to_first.callback(self._selector.close)
            for process in self._running.values():
                # It may not have entered its group yet.
                last_to_first.callback(process.wait)
                last_to_first.callback(process.kill)
            for group in self._groups:
                last_to_first.callback(remove_group, group)

    def start(
        self, place: Place, argv: Sequence[str], environment: Mapping[str, str], stdout: Output, stderr: Output
    ) -> None:
        """``start``, and looks after the process from then on."""
        self._groups.append(place.run_group)
        process = start(place, argv, environment, stdout, stderr)
        self._running[place.device] = process
        for pipe, target in ((process.stdout, 1), (process.stderr, 2)):
            if pipe is not None:
                self._descriptors.callback(pipe.close)
                forwarder = _Forwarder(pipe.fileno(), target, b"[%d] " % place.device)
                self._forwarders.append(forwarder)
                self._selector.register(pipe, selectors.EVENT_READ, partial(self._forward, forwarder))
        ended = os.pidfd_open(process.pid)
        self._descriptors.callback(os.close, ended)
        self._selector.register(ended, selectors.EVENT_READ, partial(self._note_end, place.device, ended))

    def wait(self, stop: StopSignals) -> Outcome:
        """Blocks until all have ended, and everything that they started too. Raises ``Interrupted`` after a signal."""
        self._selector.register(stop.wakes, selectors.EVENT_READ, partial(self._stop, stop))
        while self._running:
            for key, _ in self._selector.select(self._patience_s()):
                key.data()
            self._act_on_time()
        self._end_what_is_left()
        if stop.got:
            raise Interrupted(stop.got[0])
        return Outcome(
            exit_codes=dict(sorted(self._exit_codes.items())),
            failed_device=self._failed_device,
            has_timed_out=self._has_timed_out,
        )

    def _patience_s(self) -> float | None:
        times = [at for at in (self._ends_at, self._next_signal and self._next_signal[0]) if at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _act_on_time(self) -> None:
        now = time.monotonic()
        if self._ends_at is not None and now >= self._ends_at:
            self._ends_at = None
            self._has_timed_out = self._failed_device is None
            self._send(signal.SIGTERM)
        if self._next_signal is not None and now >= self._next_signal[0]:
            self._send(self._next_signal[1])

    def _send(self, number: signal.Signals) -> None:
        # SIGKILL is sent again and again, for what was just being forked.
        self._next_signal = (time.monotonic() + (0.1 if number == signal.SIGKILL else self._grace_s), signal.SIGKILL)
        # A process that was just started may not be in its group yet.
        pids = {process.pid for process in self._running.values()}
        signal_processes(pids.union(*map(processes_in, self._groups)), number)

    def _forward(self, forwarder: _Forwarder) -> None:
        if not forwarder.forward():
            self._selector.unregister(forwarder.source)

    def _note_end(self, device: int, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        status = self._running.pop(device).wait()
        self._exit_codes[device] = status if status >= 0 else 128 - status
        is_by_itself = not self._is_stopped and not self._has_timed_out
        if status and self._failed_device is None and is_by_itself:
            self._failed_device = device
            self._next_signal = (time.monotonic() + self._grace_s, signal.SIGTERM)

    def _stop(self, stop: StopSignals) -> None:
        os.read(stop.wakes, 16)
        self._is_stopped = True
        self._send(signal.SIGTERM if len(stop.got) == 1 else signal.SIGKILL)

    def _end_what_is_left(self) -> None:
        """Ends what the commands left running behind them, then forwards the last that was printed."""
        signal_processes(set().union(*map(processes_in, self._groups)), signal.SIGTERM)
        is_empty_within(self._groups, self._grace_s)
        for group in self._groups:
            remove_group(group)
        for forwarder in self._forwarders:
            forwarder.finish()
