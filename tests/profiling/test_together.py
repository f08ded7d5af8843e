"""Processes that measure together do every part at the same time, and none waits for one that is gone."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from isthmus.profiling import together
from isthmus.profiling.together import measure_together
from isthmus.spec.errors import IsthmusError

NUM_PARTS = 3


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A process that notes in a file when it begins and ends each part. Its question: the file, who it is, and in which
    part it fails."""
    script = tmp_path / "measure.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os
            import time
            from isthmus.profiling.together import Meeting

            with Meeting.join() as meeting:
                file, name, failing = meeting.question
                print("what is printed disturbs nobody")
                for part in range({NUM_PARTS}):
                    meeting.wait(f"part {{part}}", part / {NUM_PARTS})
                    if part == failing:
                        raise SystemExit("no more memory")
                    if failing == "hangs":
                        print("waits for nothing", flush=True)
                        time.sleep(100)
                    for what in ("begins", "ends"):
                        with open(file, "a") as notes:
                            notes.write(f"{{part}} {{name}} {{what}}\\n")
                meeting.end(f"{{name}}: {{os.environ['ISTHMUS_CACHE']}}")
            """
        )
    )
    return [sys.executable, str(script)]


def test_all_are_through_with_a_part_before_one_begins_the_next(command: list[str], tmp_path: Path) -> None:
    notes, told = tmp_path / "notes", []
    questions = [[str(notes), name, None] for name in "abc"]
    found = measure_together(command, questions, lambda text, fraction: told.append((text, fraction)))
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert [int(part) for part, _, _ in lines] == sorted([*range(NUM_PARTS)] * 6)
    assert told == [(f"part {part}", part / NUM_PARTS) for part in range(NUM_PARTS)]
    name, _, cache = found.partition(": ")
    assert name == "a" and not Path(cache).exists()


def test_what_one_says_before_it_ends_is_told(command: list[str], tmp_path: Path) -> None:
    questions = [[str(tmp_path / "notes"), name, 1 if name == "b" else None] for name in "ab"]
    with pytest.raises(IsthmusError, match=r"ended with 1: (.*\n)?no more memory"):
        measure_together(command, questions)
    parts = [json.loads(line.split()[0]) for line in (tmp_path / "notes").read_text().splitlines()]
    assert parts.count(0) == 4 and 2 not in parts


def test_one_that_hangs_is_ended(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "LONGEST_PART_S", 10.0)
    questions = [[str(tmp_path / "notes"), name, "hangs" if name == "b" else None] for name in "ab"]
    with pytest.raises(IsthmusError, match=r"has said nothing for 10 s: (.*\n)*waits for nothing"):
        measure_together(command, questions)
