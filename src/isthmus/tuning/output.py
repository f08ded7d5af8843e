"""The trained model appearing in a fine-tuning run's output directory."""

from __future__ import annotations

from pathlib import Path

from isthmus.models.writer import Share, write_checkpoint
from isthmus.training.output import published
from isthmus.tuning.pipeline.company import in_one_directory
from isthmus.tuning.session import Session


def write_final(session: Session, output: Path, source: Path) -> None:
    """Writes the trained model below ``output`` (see ``published``). ``source`` is where the tokenizer comes from.

    Several processes each write their own units, into a directory that all of them see.
    """
    session.finish()
    pipeline = session.pipeline
    links = pipeline.links if pipeline else None
    is_first = links is None or not links.rank
    share = Share(rank=pipeline.rank, rank_of=pipeline.division.rank_of) if pipeline else None
    with in_one_directory(published(output), links, "the directory of the trained model") as aside:
        write_checkpoint(
            aside,
            session.model,
            session.store.named,
            dtype=session.options.dtype,
            tokenizer_from=source,
            share=share,
        )
        if links is not None:
            links.gather(None, "the trained model's files")
        # Rank 0's alone: to the others the directory may be gone by now.
        written = _weights(aside) if is_first else set[str]()
    if is_first:
        _remove_others(output, written)


def _weights(directory: Path) -> set[str]:
    return {file.name for file in directory.glob("model*.safetensors*")}


def _remove_others(output: Path, written: set[str]) -> None:
    """Files of weights that an earlier end of the run has left, when other processes cut the model otherwise: who loads
    the model would take ``model.safetensors`` for it, whatever else is there."""
    for name in _weights(output) - written:
        (output / name).unlink()
