"""Processes of one host that measure the same things at the same time, each on its own cores, since what a process
takes of the host's caches and of its memory's bandwidth others have not got. They meet before every part."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from isthmus.spec.errors import IsthmusError

LAST_WORDS_BYTES = 2000
LONGEST_PART_S = 300.0
"""Whoever says nothing for longer hangs: parts take seconds."""
_HERE, _FOUND = "here", "found"


class Meeting:
    """A measuring process's side: the question that it was started with, and its way to tell the others how far it
    is. What it prints meanwhile goes to its standard error."""

    def __init__(self, incoming: TextIO, outgoing: TextIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self.question: Any = self._hear()

    @classmethod
    @contextlib.contextmanager
    def join(cls) -> Iterator[Meeting]:
        """Takes standard input and output over."""
        with os.fdopen(os.dup(1), "w") as outgoing:
            os.dup2(2, 1)
            yield cls(sys.stdin, outgoing)

    def wait(self, text: str, fraction: float) -> None:
        """Before the part that ``text`` names, of which all others know as well: blocks until all are here."""
        self._tell({_HERE: [text, fraction]})
        self._hear()

    def end(self, found: str) -> None:
        self._tell({_FOUND: found})

    def _tell(self, fact: object) -> None:
        print(json.dumps(fact), file=self._outgoing, flush=True)

    def _hear(self) -> Any:
        line = self._incoming.readline()
        if not line:
            raise SystemExit("isthmus: the process that wanted to know is gone")
        return json.loads(line)


def measure_together(
    command: Sequence[str],
    questions: Sequence[object],
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> str:
    """What the first of several processes found, all of which measured at the same time: ``command`` is started once
    for each of the ``questions`` (JSON), and makes a ``Meeting``. None of them finds or keeps a profile of others.

    Blocks until all have ended. Raises ``IsthmusError`` with the last words of one that fails, or that says nothing for
    ``LONGEST_PART_S``; the others are ended.
    """
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(_Other.started(command, question)) for question in questions]
        while True:
            told = [other.hear() for other in others]
            ended = [fact[_FOUND] for fact in told if _FOUND in fact]
            if len(ended) == len(others):
                return ended[0]
            if ended:
                raise RuntimeError(f"{len(ended)} of {len(others)} processes have measured all, the others have not")
            progress(*told[0][_HERE])
            for other in others:
                other.tell("all are here")


class _Other:
    """One of the processes, as who started it sees it."""

    def __init__(self, process: subprocess.Popen[str], errors: TextIO) -> None:
        self._process, self._errors = process, errors

    @classmethod
    @contextlib.contextmanager
    def started(cls, command: Sequence[str], question: object) -> Iterator[_Other]:
        """Told its question. Gone at the end."""
        with tempfile.TemporaryDirectory(prefix="isthmus-") as cache, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"ISTHMUS_CACHE": cache},
            )
            with process:
                try:
                    other = cls(process, errors)
                    other.tell(question)
                    yield other
                finally:
                    process.kill()

    def tell(self, fact: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it says why where it is heard
            print(json.dumps(fact), file=self._process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # It tells one line and waits for the answer, so none is left behind in a buffer.
        if not select.select([self._process.stdout], [], [], LONGEST_PART_S)[0]:
            raise IsthmusError(
                f"profile: a process that measured beside others has said nothing for {LONGEST_PART_S:g} s: "
                f"{self._last_words()}"
            )
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        raise IsthmusError(
            f"profile: a process that measured beside others ended with {self._process.returncode}: "
            f"{self._last_words()}"
        )

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-LAST_WORDS_BYTES:].strip()
