"""Cores that a process stays on. Stdlib only.

What a quota gives to a thread on one core is lost to the process's threads on others until its period ends; so all go
together."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress


def pin(cores: Collection[int], pid: int | None = None) -> None:
    """All threads that the process has run on ``cores`` from here on, as do those that it will start;
    ``sched_setaffinity`` of a process means its first thread alone, 0 the calling one. ``pid`` None: this process.

    Raises ``OSError`` where another process has ended or may not be moved.
    """
    for thread in os.listdir(f"/proc/{'self' if pid is None else pid}/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
