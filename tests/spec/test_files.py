"""isthmus.spec.files: whatever happens on the way, a path holds the whole of what was there or the whole of what is
new."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.spec.files import atomic_directory, atomic_write, recover_directory


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def write_checkpoint(path: Path, text: str) -> None:
    with atomic_directory(path) as folder:
        (folder / "weights").write_text(text)
        (folder / "state").mkdir()
        (folder / "state" / "step").write_text(text)


def failing_at(number: int, function: Callable[..., None]) -> Callable[..., None]:
    calls = 0

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            full_disk()
        function(*arguments)

    return fail


OLD = {"weights": "old", "state/step": "old"}
NEW = {"weights": "new", "state/step": "new"}


@pytest.mark.parametrize("data", ["text: é", b"\x00bytes", ""])
def test_written_file_holds_exactly_the_data(tmp_path: Path, data: str | bytes) -> None:
    path = tmp_path / "deep" / "report.json"
    atomic_write(path, "before")
    atomic_write(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(path.parent) == ["report.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_previous_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "report.json"
    atomic_write(path, "old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert contents(tmp_path) == {"report.json": "old"}


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    atomic_write(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    with atomic_directory(tmp_path / "ours.d"):
        pass
    (tmp_path / "plain.d").mkdir()
    for suffix in ("", ".d"):
        assert (tmp_path / f"ours{suffix}").stat().st_mode == (tmp_path / f"plain{suffix}").stat().st_mode


def test_directory_is_created_then_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "checkpoint"
    write_checkpoint(path, "old")
    assert contents(path) == OLD
    (path / "stale").write_text("")
    write_checkpoint(path, "new")
    assert contents(path) == NEW
    assert os.listdir(path.parent) == ["checkpoint"]


def test_link_stays_and_what_it_points_at_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(tmp_path / "real")
    write_checkpoint(link, "old")
    write_checkpoint(link, "new")
    assert link.is_symlink()
    assert contents(tmp_path / "real") == NEW


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("bug")])
def test_error_in_the_block_leaves_the_previous_directory(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "old")
    with pytest.raises(type(error)), atomic_directory(path) as folder:
        (folder / "weights").write_text("ne")
        raise error
    assert contents(tmp_path) == {f"checkpoint/{name}": text for name, text in OLD.items()}


# Flushed are two files, two directories and, after the renames, the parent.
@pytest.mark.parametrize(("call", "number"), [("rename", 1), ("rename", 2), *(("fsync", n) for n in range(1, 5))])
def test_full_disk_at_any_call_leaves_the_previous_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing_at(number, getattr(os, call)))
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(path, "new")
    assert contents(tmp_path) == {f"checkpoint/{name}": text for name, text in OLD.items()}
    write_checkpoint(path, "new")
    assert contents(path) == NEW


@pytest.mark.parametrize("is_there_before", [False, True])
def test_everything_is_on_the_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there_before: bool
) -> None:
    path = tmp_path / "checkpoint"
    if is_there_before:
        write_checkpoint(path, "old")
    flushed: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source: Path, destination: Path) -> None:
        if destination == path:
            assert {source.stat().st_ino, *(entry.stat().st_ino for entry in source.rglob("*"))} <= flushed
        flushed.discard(tmp_path.stat().st_ino)
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    write_checkpoint(path, "new")
    assert tmp_path.stat().st_ino in flushed


CRASH = """
import os, signal, sys
from pathlib import Path
from isthmus.spec.files import atomic_directory
path, at = Path(sys.argv[1]), sys.argv[2]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
rename, calls = os.rename, []
def dying(*names):
    rename(*names)
    calls.append(names)
    if at == f"rename {len(calls)}":
        die()
os.rename = dying
with atomic_directory(path) as folder:
    (folder / "weights").write_text("new")
    if at == "block":
        die()
    (folder / "state").mkdir()
    (folder / "state" / "step").write_text("new")
"""


@pytest.mark.parametrize(("at", "expected"), [("block", OLD), ("rename 1", OLD), ("rename 2", NEW)])
def test_killed_process_leaves_a_whole_directory(tmp_path: Path, at: str, expected: dict[str, str]) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "old")
    done = subprocess.run([sys.executable, "-c", CRASH, str(path), at], check=False)
    assert done.returncode == -signal.SIGKILL
    recover_directory(path)
    assert contents(tmp_path) == {f"checkpoint/{name}": text for name, text in expected.items()}


def test_write_after_a_crash_restores_the_previous_directory_first(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, "old")
    subprocess.run([sys.executable, "-c", CRASH, str(path), "rename 1"], check=False)
    assert not path.exists()
    with pytest.raises(RuntimeError), atomic_directory(path):
        raise RuntimeError("this one fails too")
    assert contents(tmp_path) == {f"checkpoint/{name}": text for name, text in OLD.items()}


def test_recovery_touches_nothing_else(tmp_path: Path) -> None:
    names = [".checkpoint.json.0123abcd.tmp", ".checkpoint.notes.tmp", ".other.0123abcd.old", "checkpoint.old"]
    for name in names:
        (tmp_path / name).mkdir()
    recover_directory(tmp_path / "checkpoint")
    recover_directory(tmp_path / "missing" / "checkpoint")
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_file_in_the_way_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file, wanted a directory"), atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"
