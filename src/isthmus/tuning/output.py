"""The trained model appearing in a fine-tuning run's output directory."""

from __future__ import annotations

from pathlib import Path

from isthmus.models.writer import write_checkpoint
from isthmus.training.output import published
from isthmus.tuning.session import Session


def write_final(session: Session, output: Path, source: Path) -> None:
    """Writes the trained model below ``output`` (see ``published``). ``source`` is where the tokenizer comes from."""
    session.finish()
    with published(output) as aside:
        write_checkpoint(aside, session.model, session.store.named, dtype=session.options.dtype, tokenizer_from=source)
