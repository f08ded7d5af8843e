"""``isthmus tune``: everything between a command line and a fine-tuned model with its report and pictures."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from isthmus.models.checkpoint_files import checkpoint_files, resolve_checkpoint
from isthmus.models.config import load_config
from isthmus.models.safetensors_file import SafetensorsReader
from isthmus.planning.popularity_trace import PopularityTrace, write_trace
from isthmus.reporting.devices_plot import write_timelines
from isthmus.reporting.environment import environment
from isthmus.reporting.host_memory import PeakHostMemory
from isthmus.reporting.loss_plot import plot_losses
from isthmus.reporting.popularity_plot import plot_popularity
from isthmus.reporting.progress import TrainingProgress
from isthmus.reporting.recorder import Recorder
from isthmus.spec.files import atomic_write
from isthmus.spec.report import RankDevice, TuneReport, TuneSummary
from isthmus.spec.serialization import to_json
from isthmus.spec.timeline import Timeline
from isthmus.training.interruption import StopSignals
from isthmus.training.output import check_file, check_output, clear_output
from isthmus.tuning.data import BatchStream, MicroBatch, load_dataset_for
from isthmus.tuning.layers import agree
from isthmus.tuning.options import TuneOptions
from isthmus.tuning.output import write_final
from isthmus.tuning.pipeline.company import (
    of_all_ranks,
    require_same,
    require_shared,
    share_cores,
    timelines_of_all,
)
from isthmus.tuning.pipeline.devices import (
    carry_by_nccl,
    devices_of_all,
    prepare_for_nccl,
    take_device,
    told_devices,
)
from isthmus.tuning.pipeline.links import DEFAULT_TIMEOUT_S, Links, is_one_of_several
from isthmus.tuning.pipeline.mapping import told
from isthmus.tuning.predictor import PredictorQuality
from isthmus.tuning.session import Session
from isthmus.tuning.trainer import Trainer

_SAMPLED_TENSORS = 512
_SAMPLED_BYTES = 256
"""Of each."""


def tune(
    model: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    columns: str | None = None,
    eval_data: str | Path | None = None,
    steps: int = 100,
    seq_len: int = 512,
    micro_batch_size: int = 1,
    micro_batches: int = 4,
    micro_batches_in_flight: int | None = None,
    learning_rate: float = 2e-5,
    schedule: str = "cosine",
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    dtype: str = "bf16",
    seed: int = 0,
    policy: str = "affinity",
    accelerator: str = "auto",
    accelerator_memory: str | int | None = None,
    num_stages: int | None = None,
    num_layers: int | None = None,
    emulate: str | None = None,
    cpu_speed: float = 1.0,
    eval_every: int = 50,
    eval_batches: int = 8,
    save_every: int = 200,
    report: str | Path | None = None,
    timeline: str | Path | None = None,
    trace: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    plain: bool | None = None,
    wire: str | None = None,
    backend: str = "gloo",
    rank_timeout: float = DEFAULT_TIMEOUT_S,
) -> TuneReport:
    """Fine-tunes a Mixture-of-Experts model and writes it, loadable by ``from_pretrained``, to ``output``.

    Parameters are those of ``isthmus tune`` (see its ``--help``); sizes may be text (``8GiB``). ``clip_norm`` 0 turns
    clipping off. Returns the report, which is also written to ``output/report.json``. Blocks until done. Takes SIGINT
    and SIGTERM over while it runs, if called from the main thread. Where torchrun has started several processes, each
    calls this and rank 0 reports; a process that is lost raises ``RankLost`` in the others.

    Raises ``ValueError`` or ``OSError`` for input that cannot work, naming the field and the fix; ``NonFiniteLoss``
    and ``Interrupted`` as ``Trainer.run``. Whatever is raised, the last checkpoint in ``output`` is whole.
    """
    options = TuneOptions(**locals())
    options.check()
    links = Links.connect(rank_timeout) if is_one_of_several() else None
    # Rank 0 speaks for all; errors are told by whoever meets them.
    console = Console(quiet=True) if links is not None and links.rank else None
    if console is None:
        _check_places(options)
    with PeakHostMemory() as memory, TrainingProgress(steps, console=console, plain=plain) as progress:
        with StopSignals(progress.message) as stop:
            return _tune(options, memory, progress, stop, links)


def _check_places(options: TuneOptions) -> None:
    """Raises for an output that is in use, or where nothing can be written."""
    inputs = [source for source in (options.model, options.data, options.eval_data) if source is not None]
    check_output(Path(options.output), inputs, resume=options.resume, overwrite=options.overwrite)
    if options.trace is not None:
        check_file("trace", Path(options.trace))


def _tune(
    options: TuneOptions, memory: PeakHostMemory, progress: TrainingProgress, stop: StopSignals, links: Links | None
) -> TuneReport:
    output = Path(options.output)
    recorder = Recorder(keep_spans=False)
    path = _checked_checkpoint(options)
    stream, evaluation = _read_data(options, path, progress)
    session_options = options.session()
    devices: tuple[RankDevice, ...] = ()
    if links is not None:
        require_same(links, _facts(options, path, stream))
        require_shared(output, links)
        devices = _take_devices(options, links, progress)
        session_options = replace(session_options, num_cores=share_cores(links))
    is_first = links is None or not links.rank
    example, largest = stream.peek(), stream.largest()
    division = mapping = None
    if links is not None:
        division, mapping = agree(options, session_options, path, largest, links, progress.phase)
        progress.message(told(mapping))
    with Session(
        path, session_options, example, recorder, progress.phase, links=links, largest=largest, division=division
    ) as session:
        if session.plan.num_in_flight < options.micro_batches:
            progress.message(_in_flight(session, options))
        trainer = Trainer(session, stream, evaluation, output, options.trainer(), recorder, progress, stop)
        if options.overwrite and is_first:
            # Not before: a run is only replaced by one whose input is known to be good.
            clear_output(output)
        if options.resume and not trainer.resume():
            progress.message(f"{output} holds no checkpoint yet: starting with step 1")
        trainer.run()
        progress.phase("writing the model")
        write_final(session, output, path)
        result = TuneReport(
            config=options.plain_values(),
            environment=environment(),
            steps=tuple(trainer.records),
            summary=of_all_ranks(summarise(session, trainer, memory.peak_bytes), links),
            mapping=mapping,
            devices=devices,
        )
        timelines = timelines_of_all(recorder.timeline(), links)
        if links is not None:
            links.close()
        if not is_first:
            return result
        for place in {output / "report.json", Path(options.report or output / "report.json")}:
            atomic_write(place, to_json(result))
        if options.trace is not None and trainer.counts:
            write_trace(PopularityTrace.of_steps(session.model.whole_spec, trainer.counts), Path(options.trace))
        progress.phase("drawing")
        _draw(session, trainer, timelines, options)
    return result


def _take_devices(options: TuneOptions, links: Links, progress: TrainingProgress) -> tuple[RankDevice, ...]:
    """Each process takes a GPU of its own, where GPUs are used."""
    devices: tuple[RankDevice, ...] = ()
    if options.accelerator in ("auto", "cuda") and options.emulate is None:
        if options.backend == "nccl":
            prepare_for_nccl()
        devices = devices_of_all(take_device(links.rank), links)
    if devices:
        progress.message(told_devices(devices))
    if options.backend == "nccl":
        carry_by_nccl(devices, links)
    return devices


def _in_flight(session: Session, options: TuneOptions) -> str:
    reason = "as asked" if options.micro_batches_in_flight else "activations of more do not fit"
    return f"at most {session.plan.num_in_flight} of {options.micro_batches} micro-batches in flight: {reason}"


def _facts(options: TuneOptions, path: Path, stream: BatchStream) -> dict[str, object]:
    """What must be the same in all processes of a run."""
    names = {"plain", "report", "timeline", "trace", "model", "data", "eval_data", "output"}
    values = {name: value for name, value in options.plain_values().items() if name not in names}
    config = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()[:16]
    return values | {
        "config.json of the model": config,
        "weights of the model (names, shapes, sizes, some values)": _weights_digest(path),
        "data": stream.state_dict()["dataset"],
    }


def _weights_digest(path: Path) -> str:
    """Of the headers of a checkpoint's files, of their sizes, and of a few values of many tensors: a fine-tuned sibling
    differs, and no tensor is read as a whole."""
    digest = hashlib.sha256()
    files = checkpoint_files(path)
    for file in files:
        with SafetensorsReader(file) as reader:
            tensors = sorted((name, stored.shape, stored.dtype) for name, stored in reader.tensors.items())
            digest.update(repr([tensors, file.stat().st_size]).encode())
            # Any, not every nth, which could meet only one kind of matrix.
            drawn = sorted(reader.tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
            for name in drawn[: max(1, _SAMPLED_TENSORS // len(files))]:
                num_bytes = reader.tensors[name].num_bytes
                sample = torch.empty(min(num_bytes, _SAMPLED_BYTES), dtype=torch.uint8)
                reader.read_bytes_into(name, sample, (num_bytes - sample.numel()) // 2)
                digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _checked_checkpoint(options: TuneOptions) -> Path:
    """Where the checkpoint is. Raises for one that cannot be trained or is not all there, before the data is read."""
    path = resolve_checkpoint(options.model)
    load_config(path, num_layers=options.num_layers)
    for file in checkpoint_files(path):
        SafetensorsReader(file).close()
    return path


def _read_data(options: TuneOptions, path: Path, progress: TrainingProgress) -> tuple[BatchStream, list[MicroBatch]]:
    """Training data as a stream of steps, and the micro-batches to evaluate on."""
    batching: dict[str, Any] = {
        "micro_batch_size": options.micro_batch_size,
        "num_micro_batches": options.micro_batches,
        "seed": options.seed,
    }
    read = partial(
        load_dataset_for,
        path,
        load_config(path),
        seq_len=options.seq_len,
        columns=options.columns,
        progress=partial(progress.phase, "reading data"),
    )
    stream = BatchStream(read(options.data), **batching)
    if options.eval_data is None:
        return stream, []
    held_out = BatchStream(read(options.eval_data), **batching).evaluation_batches(options.eval_batches)
    return stream, [batch for step in held_out for batch in step]


def summarise(session: Session, trainer: Trainer, peak_host_bytes: int) -> TuneSummary:
    """Figures of the steady state: the first step, which warms up, is left out where there are more."""
    steady = trainer.records[1:] or trainer.records
    seconds = sum(record.duration_s for record in steady)
    predictor = session.placement.predictor
    quality = predictor.quality if predictor is not None else PredictorQuality()
    return TuneSummary(
        tokens_per_s=sum(record.num_tokens for record in steady) / seconds,
        bound_share=sum(record.bound_s for record in steady) / seconds,
        peak_accelerator_bytes=session.accelerator.peak_bytes,
        accelerator_budget_bytes=session.accelerator.budget_bytes,
        peak_host_bytes=peak_host_bytes,
        needed_host_bytes=session.store.total_bytes,
        micro_batches_in_flight=session.plan.num_in_flight,
        predictor_token_accuracy=quality.token_accuracy,
        predictor_least_popular_quarter_accuracy=quality.least_popular_quarter_accuracy,
    )


def _draw(session: Session, trainer: Trainer, timelines: tuple[Timeline, ...], options: TuneOptions) -> None:
    """The pictures of a run: timeline (also as a Chrome trace), expert popularity, losses.

    A finished run that was resumed took no step here: then the first two stay as they are.
    """
    output = Path(options.output)
    path = Path(options.timeline or output / "timeline.json")
    if any(timeline.spans for timeline in timelines):
        stages = session.pipeline.division.stages if session.pipeline else ()
        write_timelines(timelines, stages, path, title=options.policy)
    totals: defaultdict[int, list[int]] = defaultdict(list)
    for counts_LE in trainer.counts:
        for layer, counts in counts_LE.items():
            before = totals[layer] or [0] * len(counts)
            totals[layer] = [a + b for a, b in zip(before, counts, strict=True)]
    if totals:
        plot_popularity({layer: totals[layer] for layer in sorted(totals)}, output / "popularity.png")
    plot_losses(trainer.records, output / "loss.png")
