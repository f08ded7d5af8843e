"""``isthmus decouple``: everything between a checkpoint and its decoupled copy with a report of what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from isthmus.data import load_tokenizer, pad_token_id
from isthmus.decoupling.corpus import Corpus, read_corpus
from isthmus.decoupling.distillation import Distiller, autocast
from isthmus.decoupling.pair import Wanted, open_source, quiet
from isthmus.decoupling.slicing import INITIALISATIONS, fit_weights
from isthmus.decoupling.trainer import Trainer, TrainingOptions
from isthmus.models.attention import use_blocked_attention
from isthmus.reporting.environment import environment
from isthmus.reporting.progress import TrainingProgress
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.report import DecoupleReport, FidelityPoint
from isthmus.spec.serialization import to_json
from isthmus.training.batches import Batch, BatchStream, fixed_batches
from isthmus.training.heap import keep_freed_memory
from isthmus.training.interruption import StopSignals
from isthmus.training.output import check_output, clear_output

EVALUATION_TOKENS = 4096
FIT_TOKENS = 8192
"""Tokens that slices are fitted on; more were no better (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class DecoupleOptions:
    """What ``isthmus decouple`` was asked for. Names, defaults and meanings are those of ``decouple``."""

    model: str | Path
    output: str | Path
    text: tuple[str, ...]
    wanted: Wanted
    training: TrainingOptions
    seq_len: int
    batch_tokens: int
    initialisation: str
    dtype: str
    device: str
    seed: int
    resume: bool
    overwrite: bool
    plain: bool | None


def decouple(
    model: str | Path,
    *,
    output: str | Path,
    text: Sequence[str | Path],
    sub_blocks: int = 2,
    groups: int | None = None,
    original_layers: Sequence[int] | None = None,
    widths: Sequence[float] | None = None,
    heads: str = "all",
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_tokens: int = 1024,
    seq_len: int = 128,
    initialisation: str = "fitted",
    patience: int | None = None,
    dtype: str = "bf16",
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    plain: bool | None = None,
) -> DecoupleReport | None:
    """Turns the checkpoint ``model`` into a decoupled one below ``output``: slices, fitted, then distilled on ``text``.

    Parameters are those of ``isthmus decouple`` (see its ``--help``). Under torchrun every process calls this with the
    same arguments. Returns the report, which is also written to ``output/report.json`` (None on ranks but the first).
    Blocks until done. Takes SIGINT and SIGTERM over while it runs, if called from the main thread.

    Raises ``ValueError`` or ``OSError`` for input that cannot work, naming the field and the fix, and ``Interrupted``.
    """
    if steps is None and minutes is None:
        minutes = 30.0
    options = DecoupleOptions(
        model=model,
        output=output,
        text=tuple(map(str, text)),
        wanted=Wanted(
            sub_blocks=sub_blocks,
            groups=groups,
            original_layers=None if original_layers is None else tuple(original_layers),
            widths=None if widths is None else tuple(widths),
            heads=heads,
        ),
        training=TrainingOptions(num_steps=steps, minutes=minutes, learning_rate=learning_rate, patience=patience),
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        initialisation=initialisation,
        dtype=dtype,
        device=device,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        plain=plain,
    )
    _check(options)
    with _process_group() as rank:
        title = "isthmus decouple"
        with TrainingProgress(steps or 0, title=title, plain=plain) if rank == 0 else _Silent() as progress:
            with StopSignals(progress.message) as stop:
                return _decouple(options, rank, progress, stop)


def _check(options: DecoupleOptions) -> None:
    options.training.check()
    for name, value, least in (
        ("seq_len", options.seq_len, 8),
        ("batch_tokens", options.batch_tokens, 1),
        ("seed", options.seed, 0),
    ):
        if value < least:
            raise IsthmusError(f"{name}: got {value}, wanted {least} or more")
    if options.initialisation not in INITIALISATIONS:
        raise IsthmusError(f"init: got {options.initialisation!r}, wanted {' or '.join(INITIALISATIONS)}")
    if not options.text:
        raise IsthmusError("text: give --text FILE: text to distil on, of the kind that the model is used on")


def _decouple(options: DecoupleOptions, rank: int, progress: Any, stop: StopSignals) -> DecoupleReport | None:
    quiet()
    source = open_source(options.model)
    config = options.wanted.config(source.config)
    output = Path(options.output)
    if rank == 0:
        inputs = [name for name in (options.model, *options.text) if not str(name).startswith("hf:")]
        check_output(output, inputs, resume=options.resume, overwrite=options.overwrite)
    progress.phase("reading text")
    tokenizer = load_tokenizer(source.directory)
    limit = getattr(config, "max_position_embeddings", options.seq_len) - (
        2 if source.config.model_type == "roberta" else 0
    )
    corpus = read_corpus(
        options.text,
        tokenizer,
        seq_len=min(options.seq_len, limit),
        is_causal=source.is_causal,
        seed=options.seed,
        progress=lambda share: progress.phase("reading text", share),
    )
    if corpus.warning is not None:
        progress.message(corpus.warning)
    if options.overwrite and rank == 0:
        clear_output(output)  # not before: a run is only replaced by one whose input is known to be good
    padding = pad_token_id(tokenizer)
    keep_freed_memory()
    torch.manual_seed(options.seed)
    progress.phase("reading the model")
    original = source.load()
    decoupled = source.decoupled(original, config)
    device = _device(options.device)
    for model in (original, decoupled):
        model.to(device)  # type: ignore[arg-type]
        if device.type == "cpu":
            use_blocked_attention(model)
    trainer = _trainer(options, corpus, Distiller(original, decoupled, dtype=options.dtype), padding, progress, stop)
    if not (options.resume and trainer.resume()) and options.initialisation == "fitted":
        batches = _first_batches(corpus, padding, device)
        with autocast(device, options.dtype):
            fit_weights(original, decoupled, batches, progress=lambda share: progress.phase("fitting slices", share))
    trainer.run()
    if rank:
        return None
    progress.phase("writing the model")
    source.write(decoupled.cpu(), output)
    report = _report(options, corpus, trainer)
    atomic_write(output / "report.json", to_json(report))
    return report


def _first_batches(corpus: Corpus, padding: int, device: torch.device) -> list[Batch]:
    texts, num_tokens = [], 0
    for text in corpus.texts:
        texts.append(text)
        num_tokens += len(text)
        if num_tokens >= FIT_TOKENS:
            break
    batches = fixed_batches(texts, EVALUATION_TOKENS, padding)
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _trainer(
    options: DecoupleOptions, corpus: Corpus, distiller: Distiller, padding: int, progress: Any, stop: StopSignals
) -> Trainer:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stream = BatchStream(
        corpus.texts,
        tokens_per_batch=options.batch_tokens,
        pad_token_id=padding,
        seed=options.seed,
        part=rank,
        num_parts=world_size,
    )
    held_out = fixed_batches(corpus.held_out, EVALUATION_TOKENS, padding)
    return Trainer(
        distiller.decoupled,
        distiller.loss,
        stream,
        lambda: distiller.evaluate(held_out),
        options=options.training,
        output=Path(options.output),
        progress=progress,
        stop=stop,
    )


def _report(options: DecoupleOptions, corpus: Corpus, trainer: Trainer) -> DecoupleReport:
    config = json.loads(json.dumps(asdict(options), default=str)) | {
        "num_texts": len(corpus.texts),
        "num_tokens": corpus.num_tokens,
        "num_held_out": len(corpus.held_out),
        "num_steps": trainer.num_steps,
    }
    curve = tuple(
        FidelityPoint(
            step=record.step,
            minutes=record.elapsed_s / 60,
            num_tokens=record.num_tokens,
            loss=float(record.evaluation["loss"] or 0.0),
            cosine=record.evaluation["cosine"],
            spearman=record.evaluation["spearman"],
            original_loss=record.evaluation["original_loss"],
            divergence=record.evaluation["divergence"],
        )
        for record in trainer.records
    )
    return DecoupleReport(config=config, environment=environment(), curve=curve)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise IsthmusError(f"device: got {name}, but PyTorch finds no GPU here; take --device cpu")
    return torch.device(name)


@contextmanager
def _process_group() -> Iterator[int]:
    """This process's rank, with torch.distributed set up where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


class _Silent(nullcontext):
    """Progress of ranks that say nothing."""

    num_steps = 0

    def __enter__(self) -> _Silent:
        return self

    def phase(self, text: str, fraction: float | None = None) -> None: ...
    def step(self, view: object) -> None: ...
    def evaluation(self, step: int, result: object) -> None: ...
    def message(self, text: str) -> None: ...
