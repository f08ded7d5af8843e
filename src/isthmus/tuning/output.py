"""The trained model appearing in a fine-tuning run's output directory."""

from __future__ import annotations

from pathlib import Path

from isthmus.models.writer import Share, write_checkpoint
from isthmus.training.output import published
from isthmus.tuning.session import Session


def write_final(session: Session, output: Path, source: Path) -> None:
    """Writes the trained model below ``output`` (see ``published``). ``source`` is where the tokenizer comes from.

    Several processes each write their own units, into a directory that all of them see.
    """
    session.finish()
    if session.pipeline is None:
        with published(output) as aside:
            _write(session, aside, source, None)
            written = _weights(aside)
        _remove_others(output, written)
        return
    links = session.pipeline.links
    share = Share(rank=links.rank, rank_of=session.pipeline.division.rank_of)
    if links.rank:
        _write(session, Path(links.from_first(None, "the directory of the trained model")), source, share)
        links.gather(None, "the trained model's files")
        return
    with published(output) as aside:
        links.from_first(str(aside.absolute()), "the directory of the trained model")
        _write(session, aside, source, share)
        links.gather(None, "the trained model's files")
        written = _weights(aside)
    _remove_others(output, written)


def _weights(directory: Path) -> set[str]:
    return {file.name for file in directory.glob("model*.safetensors*")}


def _remove_others(output: Path, written: set[str]) -> None:
    """Files of weights that an earlier end of the run has left, when other processes cut the model otherwise: who loads
    the model would take ``model.safetensors`` for it, whatever else is there."""
    for name in _weights(output) - written:
        (output / name).unlink()


def _write(session: Session, directory: Path, source: Path, share: Share | None) -> None:
    write_checkpoint(
        directory, session.model, session.store.named, dtype=session.options.dtype, tokenizer_from=source, share=share
    )
