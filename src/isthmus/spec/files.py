"""Writing so that nothing is lost: a file or a directory is there whole, as it was before or as it is now, never half.

What is written goes aside first, is flushed to the disk, and takes its name by a rename. A full disk, an error or a
crash on the way leaves the previous one whole. One writer at a time per path. Stdlib only.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def cache_directory() -> Path:
    """``$ISTHMUS_CACHE``, else ``isthmus`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if "ISTHMUS_CACHE" in os.environ:
        return Path(os.environ["ISTHMUS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isthmus"


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes ``data`` (text as UTF-8) to the file ``path``, replacing it in one step; missing parents are made.

    Blocks until the data is on the disk. Raises ``OSError`` as the file system does (``ENOSPC`` on a full disk); the
    previous file is then untouched and nothing is left beside it.
    """
    target = _resolved(path)
    content = data.encode() if isinstance(data, str) else data
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives an empty directory to write into; when the block ends well, it becomes the directory ``path``.

    A directory that is there already is replaced whole: it is renamed aside, the new one takes its name, the old one is
    removed. If the machine dies between the two renames, the old one lies complete beside ``path``, and
    ``recover_directory`` (called here first, and by whoever reads ``path`` after a crash) gives it its name back.

    Blocks at the end until everything written is on the disk. If the block or the flushing raises (``OSError`` with
    ``ENOSPC`` on a full disk, ``KeyboardInterrupt``, anything), what was written is removed, the previous directory is
    untouched and the error goes on. Raises ``NotADirectoryError`` when ``path`` is a file.
    """
    target = _resolved(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, wanted a directory or nothing there: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(target)
    aside = _aside(target)
    try:
        aside.mkdir()
        yield aside
        _sync_tree(aside)
        _take_name(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def recover_directory(path: str | os.PathLike[str]) -> None:
    """Undoes what a crash inside ``atomic_directory(path)`` left: restores the name of a previous directory that was
    aside, and removes half-written ones. Does nothing when there is nothing to do. Not while another process writes."""
    target = _resolved(path)
    if not target.parent.is_dir():
        return
    leftover = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    leftovers = [entry for entry in target.parent.iterdir() if leftover.fullmatch(entry.name)]
    previous = [entry for entry in leftovers if entry.suffix == ".old"]
    if previous and not target.exists():
        os.rename(max(previous, key=lambda entry: entry.stat().st_mtime), target)
    for entry in leftovers:
        shutil.rmtree(entry, ignore_errors=True)


def _take_name(aside: Path, target: Path) -> None:
    if not target.exists():
        os.rename(aside, target)
        _sync(target.parent)
        return
    # rename() onto a directory that holds something fails, so the old one must step aside first.
    previous = aside.with_suffix(".old")
    os.rename(target, previous)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(previous, target)
        raise
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _resolved(path: str | os.PathLike[str]) -> Path:
    # Through links: what a link points at is replaced, and the link stays.
    return Path(os.path.realpath(path))


def _aside(target: Path) -> Path:
    # In the same directory, since a rename is atomic only inside one file system.
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))
