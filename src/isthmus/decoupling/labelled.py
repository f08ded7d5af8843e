"""Distillation for a task: the original is fine-tuned on it first, and the copy learns to classify as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedModel

from isthmus.decoupling.pair import Source, open_source
from isthmus.decoupling.processes import ranks
from isthmus.evaluation.encoding import Place
from isthmus.evaluation.finetuning import Recipe, encode_examples, predict, train_classifier
from isthmus.evaluation.metrics import METRICS
from isthmus.evaluation.tasks import Task, open_task
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import TaskScore

FINE_TUNED = "original"
"""Directory below the output for the original, fine-tuned."""


def open_labelled(source: str) -> Task:
    """The task to distil for. Raises ``IsthmusError`` for one that is not classification."""
    task = open_task(source)
    if task.is_questions:
        raise IsthmusError(f"task: {source} has questions; a copy is distilled for classification, or without a task")
    return task


def fine_tuned(
    source: Source, tokenizer: Any, task: Task, output: Path, recipe: Recipe, *, seed: int, place: Place, progress: Any
) -> Source:
    """``source`` fine-tuned on the task by the recipe of ``isthmus evaluate``, below ``output``; trained unless it is
    there already. Blocks."""
    directory = output / FINE_TUNED
    if ranks()[0] == 0 and not (directory / "config.json").is_file():
        model = train_classifier(
            str(source.directory),
            tokenizer,
            task,
            recipe,
            seed=seed,
            place=place,
            progress=lambda share: progress.phase("fine-tuning the original", share),
        )
        directory.mkdir(exist_ok=True)
        source.write(model.cpu(), directory)  # type: ignore[call-arg]
    if dist.is_initialized():
        dist.barrier()
    return open_source(directory)


def texts_of(tokenizer: Any, task: Task, seq_len: int) -> list[np.ndarray]:
    """The training examples as a corpus has them: ids (T,), or (2, T) with token types where the tokenizer gives them
    and they differ."""
    texts = []
    for row in encode_examples(tokenizer, task.train, seq_len):
        ids, types = row["input_ids"].astype(np.int32), row.get("token_type_ids")
        texts.append(np.stack([ids, types.astype(np.int32)]) if types is not None and types.any() else ids)
    return texts


def score(
    original: PreTrainedModel, decoupled: PreTrainedModel, tokenizer: Any, task: Task, seq_len: int, place: Place
) -> TaskScore:
    """Both models' answers to the development examples."""
    encoded = encode_examples(tokenizer, task.development, seq_len)
    wanted = np.array([task.labels.index(example.label) for example in task.development])
    values = [
        METRICS[task.metric](predict(model, encoded, tokenizer, place), wanted) for model in (original, decoupled)
    ]
    return TaskScore(task=task.name, metric=task.metric, original=values[0], decoupled=values[1])
