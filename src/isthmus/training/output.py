"""The output directory of a training run: who may write into it, and the trained model appearing in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.spec.errors import IsthmusError


def check_output(output: Path, inputs: list[str | Path], *, resume: bool, overwrite: bool) -> None:
    """Whether a run may write to ``output``. Changes nothing, apart from making the directory where there is none.

    One that holds a run needs ``resume`` or ``overwrite``; one that holds anything else is never written to, and
    neither is one that holds an input. Raises ``IsthmusError``.
    """
    if output.exists() and not output.is_dir():
        raise IsthmusError(f"output: {output} is a file; name a directory.")
    whole = output.resolve()
    for path in (Path(name).expanduser() for name in inputs):
        if path.exists() and path.resolve().is_relative_to(whole) and (overwrite or path.is_dir()):
            raise IsthmusError(f"output: {output} holds {path}, which this run reads; name another directory.")
    is_run = any((output / name).exists() for name in ("checkpoints", "report.json", "original/config.json"))
    if output.is_dir() and any(output.iterdir()) and not is_run:
        raise IsthmusError(f"output: {output} already holds files that are not a run's; name a new or empty directory.")
    if is_run and not (resume or overwrite):
        raise IsthmusError(
            f"output: {output} already holds a run. Add --resume to continue it, --overwrite to replace it, or name "
            "another directory."
        )
    output.mkdir(parents=True, exist_ok=True)


def check_file(field: str, path: Path) -> None:
    """Whether ``path`` can be written, so that nothing long is done in vain. Changes nothing. Raises ``IsthmusError``
    naming ``field``."""
    if path.is_dir():
        raise IsthmusError(f"{field}: {path} is a directory, wanted a file's name.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise IsthmusError(f"{field}: nothing can be written below {parent}, wanted a directory of yours.")


def clear_output(output: Path) -> None:
    """Deletes all that ``output`` holds: ``check_output`` has found it to be a run that may be replaced."""
    for entry in output.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """Gives an empty directory; what is written there appears below ``output`` when the block ends well: each file
    renamed into place, ``config.json`` last. On a full disk (``OSError``) what was there before stays."""
    aside = output / ".writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        files = [file.relative_to(aside) for file in aside.rglob("*") if file.is_file()]
        for file in files:
            with (aside / file).open("rb") as opened:
                os.fsync(opened.fileno())
        for file in sorted(files, key=lambda file: file.name == "config.json" and len(file.parts) == 1):
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            (aside / file).replace(output / file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
