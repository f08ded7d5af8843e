"""The trained model appearing in a fine-tuning run's output directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from isthmus.models.writer import write_checkpoint
from isthmus.tuning.session import Session


def write_final(session: Session, output: Path, source: Path) -> None:
    """Writes the trained model below ``output``: aside first, then each file renamed into place, ``config.json`` last.

    ``source`` is where the tokenizer comes from. On a full disk (``OSError``) what was there before stays.
    """
    session.finish()
    aside = output / ".writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write_checkpoint(aside, session.model, session.store.named, dtype=session.options.dtype, tokenizer_from=source)
        for file in aside.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(output / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
