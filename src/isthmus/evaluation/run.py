"""``isthmus evaluate``: several models on several tasks, all by the same recipe, as rows of a report."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging

from isthmus.data import load_tokenizer, read_records
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.encoding import Place
from isthmus.evaluation.fidelity import MAX_TEXTS, fidelity
from isthmus.evaluation.finetuning import Recipe, answer, classify
from isthmus.evaluation.metrics import METRICS
from isthmus.evaluation.perplexity import causal_perplexity, masked_perplexity
from isthmus.evaluation.probe import probe
from isthmus.evaluation.tasks import Task, open_task
from isthmus.models.attention import use_blocked_attention
from isthmus.models.checkpoint_files import checkpoint_files, resolve_checkpoint
from isthmus.models.transformer_families import read_config
from isthmus.reporting.environment import environment
from isthmus.reporting.progress import TrainingProgress
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.report import EvaluateReport, EvaluateRow
from isthmus.spec.serialization import to_json

METHODS = ("finetune", "probe", "fidelity", "perplexity")
_MAX_PROBE = 10_000

Say = Callable[[str, float], None]
"""Told what goes on, and the share of it that is done."""


@dataclass(frozen=True)
class Candidate:
    """A model that is evaluated."""

    name: str
    directory: Path
    num_sub_blocks: int
    original_layers: tuple[int, ...]
    is_decoder: bool

    def row(self, task: str, metric: str, values: Sequence[float]) -> EvaluateRow:
        return EvaluateRow(
            model=self.name,
            num_sub_blocks=self.num_sub_blocks,
            original_layers=self.original_layers,
            task=task,
            metric=metric,
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else 0.0,
            num_seeds=len(values),
        )


def evaluate(
    models: Sequence[str | Path],
    *,
    tasks: Sequence[str] = (),
    train: str | None = None,
    text: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    num_seeds: int = 3,
    recipe: Recipe | None = None,
    max_train: int | None = None,
    dtype: str = "bf16",
    device: str = "auto",
    report: str | Path | None = None,
    save: str | Path | None = None,
    console: Console | None = None,
) -> EvaluateReport:
    """Scores every model on every task, and the others' fidelity to the first. Parameters are those of ``isthmus
    evaluate`` (see its ``--help``). Blocks until done.

    Raises ``ValueError`` or ``OSError`` for input that cannot work, naming the field and the fix.
    """
    recipe = recipe or Recipe()
    recipe.check()
    if num_seeds < 1:
        raise IsthmusError(f"seeds: got {num_seeds}, wanted 1 or more")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    candidates = [_candidate(model) for model in models]
    opened = [open_task(task, train, max_train=max_train) for task in tasks]
    save = _checked_save(save, [each.directory.name for each in candidates], [task.name for task in opened])
    texts = list(_texts(text))
    chosen = _methods(methods, opened, texts, candidates)
    place = Place(_device(device), dtype)
    rows: list[EvaluateRow] = []
    with TrainingProgress(0, title="isthmus evaluate", console=console) as progress:
        for task, candidate in itertools.product(opened, candidates):
            rows += _scores(candidate, task, chosen, recipe, range(num_seeds), place, progress, save)
        if "fidelity" in chosen:
            rows += _fidelities(candidates, texts or opened[0].development_texts, place, progress.phase)
        if "perplexity" in chosen:
            rows += [_perplexity(candidate, texts, recipe, place, progress.phase) for candidate in candidates]
    config: dict[str, object] = {
        "models": [str(model) for model in models],
        "tasks": list(tasks),
        "train": train,
        "text": list(text),
        "methods": list(chosen),
        "num_seeds": num_seeds,
        "recipe": asdict(recipe),
        "max_train": max_train,
        "dtype": dtype,
        "notes": [task.note for task in opened if task.note],
        "num_train": [len(task.train) or len(task.train_questions) for task in opened],
        "num_development": [len(task.development) or len(task.development_questions) for task in opened],
    }
    result = EvaluateReport(config=config, environment=environment(), rows=tuple(rows))
    if report is not None:
        atomic_write(report, to_json(result))
    return result


def _candidate(model: str | Path) -> Candidate:
    directory = resolve_checkpoint(model)
    config: Any = read_config(directory)
    checkpoint_files(directory)
    num_layers = config.num_hidden_layers
    name = (config.architectures or [""])[0]
    return Candidate(
        name=str(model),
        directory=directory,
        num_sub_blocks=getattr(config, "num_sub_blocks", 1),
        original_layers=tuple(getattr(config, "original_layers", None) or range(num_layers)),
        is_decoder=name.endswith(("ForCausalLM", "LMHeadModel")),
    )


def _checked_save(save: str | Path | None, models: Sequence[str], tasks: Sequence[str]) -> Path | None:
    if save is None:
        return None
    for names, what in ((models, "models"), (tasks, "tasks")):
        if len(set(names)) < len(names):
            raise IsthmusError(f"save: got {what} {', '.join(names)}, wanted each name once, to keep them apart")
    for name in models:
        if (Path(save) / name).exists():
            raise IsthmusError(f"save: {Path(save) / name} is there already; remove it or name another directory")
    return Path(save)


def _methods(
    methods: Sequence[str] | None, tasks: Sequence[Task], texts: Sequence[str], candidates: Sequence[Candidate]
) -> tuple[str, ...]:
    """What is asked for, or all that can be done with what is given."""
    if methods is None:
        can = {
            "finetune": bool(tasks),
            "probe": any(not task.is_questions for task in tasks),
            "fidelity": len(candidates) > 1 and bool(tasks or texts),
            "perplexity": bool(texts) and all(candidate.is_decoder for candidate in candidates),
        }
        methods = [name for name, is_possible in can.items() if is_possible]
    for name in methods:
        if name not in METHODS:
            raise IsthmusError(f"methods: got {name!r}, wanted some of {', '.join(METHODS)}")
    if not methods:
        raise IsthmusError("task: nothing to evaluate on; give --task FILE, or --text FILE for fidelity or perplexity")
    if {"finetune", "probe"} & set(methods) and not tasks:
        raise IsthmusError("task: finetune and probe need --task FILE")
    if "perplexity" in methods and not texts:
        raise IsthmusError("text: perplexity needs --text FILE")
    if "fidelity" in methods and not (tasks or texts):
        raise IsthmusError("text: fidelity needs --text FILE or --task FILE")
    return tuple(methods)


def _texts(sources: Sequence[str]) -> Iterator[str]:
    for source in sources:
        for record in read_records(source):
            for value in record.fields.values():
                if isinstance(value, str) and value.strip():
                    yield value


def _scores(
    candidate: Candidate,
    task: Task,
    methods: Sequence[str],
    recipe: Recipe,
    seeds: Sequence[int],
    place: Place,
    progress: TrainingProgress,
    save: Path | None,
) -> list[EvaluateRow]:
    tokenizer = load_tokenizer(candidate.directory)
    rows: list[EvaluateRow] = []
    numbers = {label: index for index, label in enumerate(task.labels)}
    wanted = np.array([numbers[example.label] for example in task.development])
    if "probe" in methods and not task.is_questions:
        rows.append(
            candidate.row(
                task.name, "probe accuracy", [_probe_accuracy(candidate, task, wanted, place, progress.phase)]
            )
        )
    if "finetune" not in methods:
        return rows
    values: dict[str, list[float]] = {}
    for seed in seeds:
        what = f"{candidate.name}: {task.name}, seed {seed}"
        kept = None if save is None else save / candidate.directory.name / f"{task.name}-seed-{seed}"
        options = {"seed": seed, "place": place, "progress": partial(progress.phase, what), "save": kept}
        if task.is_questions:
            scores = answer(str(candidate.directory), tokenizer, task, recipe, **options)
            found = dict(zip(("exact_match", "f1"), scores, strict=True))
        else:
            predicted = classify(str(candidate.directory), tokenizer, task, recipe, **options)
            names = dict.fromkeys((task.metric, "accuracy"))
            found = {name: METRICS[name](predicted, wanted) for name in names}
        progress.message(f"{what}: {', '.join(f'{name} {value:.4f}' for name, value in found.items())}")
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return rows + [candidate.row(task.name, name, scores) for name, scores in values.items()]


def _probe_accuracy(candidate: Candidate, task: Task, wanted: np.ndarray, place: Place, say: Say) -> float:
    say(f"{candidate.name}: {task.name}, linear probe", 0.0)
    model, tokenizer = _load(AutoModel, candidate, place), load_tokenizer(candidate.directory)
    examples = task.train[:_MAX_PROBE]
    numbers = {label: index for index, label in enumerate(task.labels)}

    def vectors(examples: Sequence[Any]) -> np.ndarray:
        parts = [embed(model, tokenizer, [example.first for example in examples], place=place)]
        if examples[0].second is not None:
            parts.append(embed(model, tokenizer, [example.second for example in examples], place=place))
            parts += [np.abs(parts[0] - parts[1]), parts[0] * parts[1]]
        return np.concatenate(parts, axis=1)

    labels = np.array([numbers[example.label] for example in examples])
    predicted = probe(vectors(examples), labels, vectors(task.development), num_labels=len(task.labels))
    return METRICS["accuracy"](predicted, wanted)


def _fidelities(candidates: Sequence[Candidate], texts: Sequence[str], place: Place, say: Say) -> list[EvaluateRow]:
    lines = [line for text in texts for line in text.splitlines() if line.strip()][:MAX_TEXTS]
    if len(lines) < 3:
        raise IsthmusError(f"text: got {len(lines)} lines to compare models on, wanted at least 3")
    vectors = []
    for candidate in candidates:
        say(f"{candidate.name}: vectors of {len(lines):,} texts", 0.0)
        model = _load(AutoModel, candidate, place)
        vectors.append(embed(model, load_tokenizer(candidate.directory), lines, place=place))
    rows = []
    for candidate, other in zip(candidates[1:], vectors[1:], strict=True):
        result = fidelity(vectors[0], other)
        rows += [candidate.row("fidelity", name, [getattr(result, name)]) for name in ("cosine", "spearman")]
    return rows


def _perplexity(candidate: Candidate, texts: Sequence[str], recipe: Recipe, place: Place, say: Say) -> EvaluateRow:
    say(f"{candidate.name}: perplexity", 0.0)
    tokenizer = load_tokenizer(candidate.directory)
    if candidate.is_decoder:
        model = _load(AutoModelForCausalLM, candidate, place)
        value = causal_perplexity(model, tokenizer, texts, seq_len=recipe.max_length, place=place)
        return candidate.row("text", "perplexity", [value])
    model = _load(AutoModelForMaskedLM, candidate, place)
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    value = masked_perplexity(model, tokenizer, lines, seq_len=recipe.max_length, place=place)
    return candidate.row("text", "masked perplexity", [value])


def _load(auto_class: Any, candidate: Candidate, place: Place) -> PreTrainedModel:
    model = auto_class.from_pretrained(candidate.directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    if place.device.type == "cpu":
        use_blocked_attention(model)
    return model.to(place.device)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise IsthmusError(f"device: got {name}, but PyTorch finds no GPU here; take --device cpu")
    return torch.device(name)
