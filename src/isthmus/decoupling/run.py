"""``isthmus decouple``: everything between a checkpoint and its decoupled copy with a report of what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from isthmus.data import load_tokenizer, pad_token_id
from isthmus.decoupling.basis import BASES, share_basis, wants_shared
from isthmus.decoupling.corpus import Corpus, read_corpus
from isthmus.decoupling.distillation import Distiller, autocast
from isthmus.decoupling.labelled import fine_tuned, open_labelled, score, texts_of
from isthmus.decoupling.maps import merge_words
from isthmus.decoupling.pair import Source, Wanted, open_source, quiet
from isthmus.decoupling.processes import device_of, process_group, progress_of, ranks
from isthmus.decoupling.sensitivity import most_sensitive, sensitivities
from isthmus.decoupling.slicing import INITIALISATIONS, fit_weights
from isthmus.decoupling.trainer import Trainer, TrainingOptions
from isthmus.evaluation.encoding import Place
from isthmus.evaluation.finetuning import Recipe
from isthmus.evaluation.tasks import Task
from isthmus.models.attention import use_blocked_attention
from isthmus.reporting.environment import environment
from isthmus.reporting.fidelity_plot import plot_fidelity
from isthmus.spec.decoupling import Decoupling
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.report import DecoupleReport, FidelityPoint, TaskScore
from isthmus.spec.serialization import to_json
from isthmus.training.batches import Batch, BatchStream, fixed_batches
from isthmus.training.heap import keep_freed_memory
from isthmus.training.interruption import StopSignals
from isthmus.training.output import check_output, clear_output

DEFAULT_MINUTES = 30.0
EVALUATION_TOKENS = 4096
SENSITIVE = "sensitive"
CROSSED_SHARE, REPLACED_SHARE = 0.7, 0.1
"""Of an encoder's texts and tokens: as they are, the copy knows the texts by heart after a few epochs (docs/log.md)."""
FIT_TOKENS = 8192
"""Tokens that slices are fitted on; more were no better (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class DecoupleOptions:
    """What ``isthmus decouple`` was asked for. Names, defaults and meanings are those of ``decouple``."""

    model: str | Path
    output: str | Path
    text: Sequence[str | Path]
    eval_text: Sequence[str | Path]
    task: str | None
    epochs: int
    sub_blocks: int
    groups: int | None
    original_layers: Sequence[int] | Literal["sensitive"] | None
    widths: Sequence[float] | None
    heads: str
    minutes: float | None
    steps: int | None
    learning_rate: float
    batch_tokens: int
    seq_len: int
    basis: str
    init: str
    patience: int | None
    dtype: str
    device: str
    seed: int
    resume: bool
    overwrite: bool
    plain: bool | None

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            sub_blocks=self.sub_blocks,
            groups=self.groups,
            original_layers=None
            if self.original_layers is None or self.original_layers == SENSITIVE
            else tuple(self.original_layers),
            widths=None if self.widths is None else tuple(self.widths),
            heads=self.heads,
        )

    @property
    def training(self) -> TrainingOptions:
        minutes = DEFAULT_MINUTES if self.steps is None and self.minutes is None else self.minutes
        return TrainingOptions(
            num_steps=self.steps, minutes=minutes, learning_rate=self.learning_rate, patience=self.patience
        )


def decouple(
    model: str | Path,
    *,
    output: str | Path,
    text: Sequence[str | Path] = (),
    eval_text: Sequence[str | Path] = (),
    task: str | None = None,
    epochs: int = 1,
    sub_blocks: int = 2,
    groups: int | None = None,
    original_layers: Sequence[int] | Literal["sensitive"] | None = None,
    widths: Sequence[float] | None = None,
    heads: str = "all",
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float = 5e-4,
    batch_tokens: int = 1024,
    seq_len: int = 128,
    basis: str = "auto",
    init: str = "fitted",
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
    options = DecoupleOptions(**locals())
    _check(options)
    with process_group() as rank, progress_of(rank, "isthmus decouple", steps, plain) as progress:
        with StopSignals(progress.message) as stop:
            return _decouple(options, rank, progress, stop)


def _check(options: DecoupleOptions) -> None:
    options.training.check()
    for name, value, least in (
        ("seq_len", options.seq_len, 8),
        ("batch_tokens", options.batch_tokens, 1),
        ("seed", options.seed, 0),
        ("epochs", options.epochs, 1),
    ):
        if value < least:
            raise IsthmusError(f"{name}: got {value}, wanted {least} or more")
    if options.init not in INITIALISATIONS:
        raise IsthmusError(f"init: got {options.init!r}, wanted {' or '.join(INITIALISATIONS)}")
    if options.basis not in BASES:
        raise IsthmusError(f"basis: got {options.basis!r}, wanted {' or '.join(BASES)}")
    if not (options.text or options.task):
        raise IsthmusError("text: give --text FILE: text to distil on, of the kind that the model is used on")


def _decouple(options: DecoupleOptions, rank: int, progress: Any, stop: StopSignals) -> DecoupleReport | None:
    quiet()
    source = open_source(options.model)
    config = options.wanted.config(source.config)
    task = None if options.task is None else open_labelled(options.task)
    output, device = Path(options.output), device_of(options.device)
    place = Place(device, options.dtype)
    if rank == 0:
        given = (options.model, *options.text, *options.eval_text, *([options.task] if options.task else []))
        inputs = [name for name in given if not str(name).startswith("hf:")]
        check_output(output, inputs, resume=options.resume, overwrite=options.overwrite)
    tokenizer = load_tokenizer(source.directory)
    corpus = _read_corpus(options, source, tokenizer, task, progress)
    if options.overwrite and rank == 0:
        clear_output(output)  # not before: a run is only replaced by one whose input is known to be good
    keep_freed_memory()
    if task is not None:
        recipe = Recipe(num_epochs=options.epochs, max_length=_seq_len(options, source))
        source = fine_tuned(source, tokenizer, task, output, recipe, seed=options.seed, place=place, progress=progress)
        config = options.wanted.config(source.config)
    torch.manual_seed(options.seed)
    padding = pad_token_id(tokenizer)
    first = _first_batches(corpus, padding, device)
    original, decoupled = _pair(options, source, config, first, place, progress)
    trainer = _trainer(options, corpus, Distiller(original, decoupled, dtype=options.dtype), padding, progress, stop)
    if not (options.resume and trainer.resume()) and options.init == "fitted":
        with place.autocast():
            fit_weights(original, decoupled, first, progress=lambda share: progress.phase("fitting slices", share))
    trainer.run()
    if rank:
        return None
    merge_words(decoupled)
    result = None
    if task is not None:
        progress.phase("classifying")
        result = score(original, decoupled, tokenizer, task, _seq_len(options, source), place)
        progress.message(
            f"{result.task}: {result.metric} {result.decoupled:.4f}, the original's is {result.original:.4f}"
        )
    progress.phase("writing the model")
    source.write(decoupled.cpu(), output)
    return _written_report(options, corpus, trainer, result, progress)


def _pair(
    options: DecoupleOptions, source: Source, config: PretrainedConfig, first: list[Batch], place: Place, progress: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The original, in the basis that was asked for, and its copy with plain slices. ``first`` is some text."""
    progress.phase("reading the model")
    original = source.load().to(place.device)  # type: ignore[arg-type]
    if wants_shared(options.basis, original):
        progress.phase("changing the basis")
        form: Decoupling = config.decoupling  # type: ignore[assignment]
        layers = [layer for layer in range(source.config.num_hidden_layers) if layer not in form.original_layers]
        path = Path(options.output) / "checkpoints" / "basis.safetensors"
        with place.autocast():
            share_basis(original, form.widths, layers, first, path)
    if options.original_layers == SENSITIVE:
        config = _by_sensitivity(options, source, original, config, first, progress)
    decoupled = source.decoupled(original, config).to(place.device)  # type: ignore[arg-type]
    if place.device.type == "cpu":
        for model in (original, decoupled):
            use_blocked_attention(model)
    return original, decoupled


def _seq_len(options: DecoupleOptions, source: Source) -> int:
    """As asked, or as many tokens as the model has positions for."""
    limit = getattr(source.config, "max_position_embeddings", options.seq_len)
    return min(options.seq_len, limit - (2 if source.config.model_type == "roberta" else 0))


def _read_corpus(options: DecoupleOptions, source: Source, tokenizer: Any, task: Task | None, progress: Any) -> Corpus:
    progress.phase("reading text")
    seq_len = _seq_len(options, source)
    corpus = read_corpus(
        options.text,
        tokenizer,
        seq_len=seq_len,
        is_windows=source.is_causal and task is None,
        more=() if task is None else texts_of(tokenizer, task, seq_len),
        held_out=options.eval_text,
        seed=options.seed,
        progress=lambda share: progress.phase("reading text", share),
    )
    if task is not None and task.note:
        progress.message(task.note)
    if corpus.warning is not None:
        progress.message(corpus.warning)
    return corpus


def _by_sensitivity(
    options: DecoupleOptions,
    source: Source,
    original: PreTrainedModel,
    config: PretrainedConfig,
    batches: list[Batch],
    progress: Any,
) -> PretrainedConfig:
    """``config`` with as many original layers, but those that are worst to decouple."""
    with autocast(original.device, options.dtype):
        errors = sensitivities(
            source,
            original,
            options.wanted,
            batches,
            progress=lambda share: progress.phase("measuring layers' sensitivity", share),
        )
    layers = most_sensitive(errors, len(config.original_layers))
    told = ", ".join(f"{layer}: {error:.3f}" for layer, error in enumerate(errors))
    progress.message(f"error when one layer is decoupled: {told}; original stay {', '.join(map(str, layers))}")
    return replace(options.wanted, groups=None, original_layers=layers).config(source.config)


def _first_batches(corpus: Corpus, padding: int, device: torch.device) -> list[Batch]:
    texts, num_tokens = [], 0
    for text in corpus.texts:
        texts.append(text)
        num_tokens += text.shape[-1]
        if num_tokens >= FIT_TOKENS:
            break
    batches = fixed_batches(texts, EVALUATION_TOKENS, padding)
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _trainer(
    options: DecoupleOptions, corpus: Corpus, distiller: Distiller, padding: int, progress: Any, stop: StopSignals
) -> Trainer:
    rank, world_size = ranks()
    stream = BatchStream(
        corpus.texts,
        tokens_per_batch=options.batch_tokens,
        pad_token_id=padding,
        seed=options.seed,
        part=rank,
        num_parts=world_size,
        crossed_share=0.0 if distiller.is_causal else CROSSED_SHARE,
        replaced_share=0.0 if distiller.is_causal else REPLACED_SHARE,
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
        beside=distiller.maps,
    )


def _written_report(
    options: DecoupleOptions, corpus: Corpus, trainer: Trainer, result: TaskScore | None, progress: Any
) -> DecoupleReport:
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
    report = DecoupleReport(config=config, environment=environment(), curve=curve, score=result)
    output = Path(options.output)
    atomic_write(output / "report.json", to_json(report))
    title = f"{Path(options.model).name}, {options.sub_blocks} sub-blocks"
    plot_fidelity(report.curve, output / "fidelity.png", title=title)
    progress.message(
        f"model        {output} (AutoModel.from_pretrained loads it after `import isthmus`)\n"
        f"fidelity     {output}/fidelity.png, report.json"
    )
    return report
