"""``isthmus tune``: everything between a command line and a fine-tuned model with its report and pictures."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.files import atomic_write
from isthmus.models.config import load_config
from isthmus.models.reader import resolve_checkpoint
from isthmus.models.writer import write_checkpoint
from isthmus.reporting.chrome_trace import write_chrome_trace
from isthmus.reporting.environment import environment
from isthmus.reporting.host_memory import PeakHostMemory
from isthmus.reporting.loss_plot import plot_losses
from isthmus.reporting.popularity_plot import plot_popularity
from isthmus.reporting.progress import TuneProgress
from isthmus.reporting.recorder import Recorder
from isthmus.reporting.timeline_plot import plot_timeline
from isthmus.spec.report import TuneReport, TuneSummary
from isthmus.spec.serialization import to_json
from isthmus.tuning.data import BatchStream, load_dataset, load_tokenizer
from isthmus.tuning.session import Session, SessionOptions
from isthmus.tuning.trainer import Trainer, TrainerOptions
from isthmus.units import parse_bytes, parse_emulate


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
    resume: bool = False,
    overwrite: bool = False,
    plain: bool | None = None,
) -> TuneReport:
    """Fine-tunes a Mixture-of-Experts model and writes it, loadable by ``from_pretrained``, to ``output``.

    Parameters are those of ``isthmus tune`` (see its ``--help``); sizes may be text (``8GiB``). ``clip_norm`` 0 turns
    clipping off. Returns the report, which is also written to ``output/report.json``. Blocks until done.

    Raises ``IsthmusError`` (a ``ValueError``) for input that cannot work, naming the field and the fix; ``NonFiniteLoss`` and
    ``Interrupted`` as ``Trainer.run``.
    """
    config = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    _check(steps=steps, seq_len=seq_len, micro_batch_size=micro_batch_size, micro_batches=micro_batches, eval_every=eval_every)
    output = Path(output)
    prepare_output(output, resume=resume, overwrite=overwrite)
    recorder = Recorder(keep_spans=False)
    with PeakHostMemory() as memory, TuneProgress(steps, plain=plain) as progress:
        path = resolve_checkpoint(model)
        is_encoder_decoder = bool(load_config(path).is_encoder_decoder)
        tokenizer = load_tokenizer(path)
        reading: dict[str, Any] = {
            "seq_len": seq_len,
            "columns": columns,
            "is_encoder_decoder": is_encoder_decoder,
            "progress": lambda share: progress.phase("reading data", share),
        }
        shape = {"micro_batch_size": micro_batch_size, "num_micro_batches": micro_batches, "seed": seed}
        dataset = load_dataset(data, tokenizer, **reading)
        stream = BatchStream(dataset, **shape)
        evaluation = []
        if eval_data is not None:
            held_out = load_dataset(eval_data, tokenizer, **reading)
            evaluation = [batch for step in BatchStream(held_out, **shape).evaluation_batches(eval_batches) for batch in step]
        options = SessionOptions(
            dtype=dtype,
            policy=policy,
            accelerator=accelerator,
            accelerator_memory_bytes=parse_bytes(accelerator_memory, "accelerator_memory") if accelerator_memory else None,
            emulation=parse_emulate(emulate) if emulate else None,
            cpu_speed=cpu_speed,
            num_stages=num_stages,
            num_layers=num_layers,
            weight_decay=weight_decay,
            clip_norm=clip_norm or None,
            seed=seed,
        )
        with Session(path, options, stream.peek(), recorder, progress.phase) as session:
            trainer = Trainer(
                session,
                stream,
                evaluation,
                output,
                TrainerOptions(
                    num_steps=steps,
                    learning_rate=learning_rate,
                    schedule=schedule,
                    warmup=warmup,
                    eval_every=eval_every,
                    save_every=save_every,
                ),
                recorder,
                progress,
            )
            if resume:
                trainer.resume()
            trainer.run()
            progress.phase("writing the model")
            write_final(session, output, path)
            result = TuneReport(
                config=config,
                environment=environment(),
                steps=tuple(trainer.records),
                summary=summarise(session, trainer, memory.peak_bytes),
            )
            progress.phase("drawing")
            draw(output, trainer, recorder, policy, Path(timeline) if timeline else output / "timeline.json")
    text = to_json(result)
    for place in {output / "report.json", Path(report) if report else output / "report.json"}:
        atomic_write(place, text)
    return result


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise IsthmusError(f"{name}: got {value}, wanted at least 1.")


def prepare_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes the directory. One that holds anything needs ``resume`` or ``overwrite`` (which removes what a run wrote there)."""
    if output.exists() and not output.is_dir():
        raise IsthmusError(f"output: {output} is a file; name a directory.")
    holds = output.is_dir() and any(output.iterdir())
    if holds and overwrite:
        shutil.rmtree(output)
    elif holds and not resume:
        raise IsthmusError(
            f"output: {output} already holds a run or other files. Add --resume to continue it, --overwrite to replace it, or name another directory."
        )
    output.mkdir(parents=True, exist_ok=True)


def write_final(session: Session, output: Path, source: Path) -> None:
    """Writes the trained model below ``output``: aside first, then each file renamed into place, ``config.json`` last."""
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


def summarise(session: Session, trainer: Trainer, peak_host_bytes: int) -> TuneSummary:
    """Figures of the steady state: the first step, which warms up, is left out where there are more."""
    steady = trainer.records[1:] or trainer.records
    seconds = sum(record.duration_s for record in steady)
    predictor = session.placement.predictor
    return TuneSummary(
        tokens_per_s=sum(record.num_tokens for record in steady) / seconds,
        bound_share=sum(record.bound_s for record in steady) / seconds,
        peak_accelerator_bytes=session.accelerator.peak_bytes,
        accelerator_budget_bytes=session.accelerator.budget_bytes,
        peak_host_bytes=peak_host_bytes,
        needed_host_bytes=session.store.total_bytes,
        predictor_token_accuracy=predictor.quality.token_accuracy if predictor else None,
        predictor_least_popular_quarter_accuracy=predictor.quality.least_popular_quarter_accuracy if predictor else None,
    )


def draw(output: Path, trainer: Trainer, recorder: Recorder, policy: str, timeline_path: Path) -> None:
    """The pictures of a run: timeline (also as a Chrome trace), expert popularity, losses."""
    timeline = recorder.timeline()
    write_chrome_trace(timeline, timeline_path)
    plot_timeline(timeline, timeline_path.with_suffix(".png"), title=policy)
    totals: defaultdict[int, list[int]] = defaultdict(list)
    for counts_LE in trainer.counts:
        for layer, counts in counts_LE.items():
            before = totals[layer] or [0] * len(counts)
            totals[layer] = [a + b for a, b in zip(before, counts, strict=True)]
    if totals:
        plot_popularity({layer: totals[layer] for layer in sorted(totals)}, output / "popularity.png")
    plot_losses(trainer.records, output / "loss.png")
