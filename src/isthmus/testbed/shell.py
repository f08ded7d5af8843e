"""Calls ``ip`` and ``tc``, and owns how their failures are told."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from isthmus.spec.errors import IsthmusError


def call(*command: str) -> str:
    """Standard output of the command, once it has ended. Raises ``IsthmusError`` with its own words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise IsthmusError(f"{' '.join(command)}: {_words(done)}")
    return done.stdout


def fails(*command: str) -> str | None:
    """What the command says when it fails, or None when it succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return _words(done) if done.returncode else None


def call_all(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        call(*command)


def _words(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stderr.split()) or f"exit code {done.returncode}"
