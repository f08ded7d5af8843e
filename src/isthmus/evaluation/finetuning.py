"""Fine-tuning on a task, every model by the same recipe: same batches, same order, same steps."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from isthmus.data import pad_token_id
from isthmus.evaluation.encoding import Encoded, Place, batches, collate, encode, shuffled
from isthmus.evaluation.formats import Example
from isthmus.evaluation.questions import Question, exact_match, overlap
from isthmus.evaluation.spans import Window, best_answers, windows
from isthmus.evaluation.tasks import Task
from isthmus.models.attention import use_blocked_attention
from isthmus.models.writer import write_whole
from isthmus.spec.errors import IsthmusError
from isthmus.training.output import published
from isthmus.training.schedule import learning_rate_at

WARMUP = 0.06
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
TEST_TOKENS = 8192

Progress = Callable[[float], None]
LossOf = Callable[[PreTrainedModel, np.ndarray], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all models that are compared have in common."""

    num_epochs: int = 1
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int = 128

    def check(self) -> None:
        for name, value in (("epochs", self.num_epochs), ("batch_size", self.batch_size), ("seq_len", self.max_length)):
            if value < 1:
                raise IsthmusError(f"{name}: got {value}, wanted 1 or more")
        if not self.learning_rate > 0:
            raise IsthmusError(f"learning_rate: got {self.learning_rate:g}, wanted more than 0")


def classify(
    directory: str,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    place: Place,
    progress: Progress,
    save: Path | None = None,
) -> np.ndarray:
    """Fine-tunes the checkpoint and returns the labels it gives the development examples, (M,) int64. As
    ``train_classifier``. ``save``: where the fine-tuned model goes."""
    model = train_classifier(directory, tokenizer, task, recipe, seed=seed, place=place, progress=progress)
    _save(model, directory, save)
    return predict(model, encode_examples(tokenizer, task.development, recipe.max_length), tokenizer, place)


def train_classifier(
    directory: str,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    place: Place,
    progress: Progress,
) -> PreTrainedModel:
    """The checkpoint, fine-tuned on the task's training examples; labels in the order of ``task.labels``.

    ``seed`` fixes the head's first weights, the order and dropout. Raises ``IsthmusError`` where the model has no head
    for classification, or the loss is not finite. Blocks.
    """
    encoded = encode_examples(tokenizer, task.train, recipe.max_length)
    labels = np.array([task.labels.index(example.label) for example in task.train])
    names = {"id2label": dict(enumerate(task.labels)), "label2id": {name: i for i, name in enumerate(task.labels)}}
    model = _load(AutoModelForSequenceClassification, directory, tokenizer, place, seed, **names)
    padding = pad_token_id(tokenizer)

    def loss_of(model: PreTrainedModel, rows: np.ndarray) -> torch.Tensor:
        batch = collate([encoded[row] for row in rows], padding, place)
        with place.autocast():
            logits = model(**batch).logits
        return nn.functional.cross_entropy(logits.float(), torch.from_numpy(labels[rows]).to(place.device))

    _train(model, encoded, loss_of, recipe, seed, progress)
    return model


def encode_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Texts or pairs as the model reads them."""
    second = None if examples[0].second is None else [example.second or "" for example in examples]
    return encode(tokenizer, [example.first for example in examples], second, max_length)


@torch.no_grad()
def predict(
    model: PreTrainedModel, encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, place: Place
) -> np.ndarray:
    """The number of the likeliest label of each, (M,) int64."""
    predicted = np.empty(len(encoded), np.int64)
    for rows, batch in batches(encoded, TEST_TOKENS, pad_token_id(tokenizer), place):
        with place.autocast():
            predicted[rows] = model(**batch).logits.float().argmax(dim=1).cpu().numpy()
    return predicted


def answer(
    directory: str,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: Recipe,
    *,
    seed: int,
    place: Place,
    progress: Progress,
    save: Path | None = None,
) -> tuple[float, float]:
    """Fine-tunes the checkpoint on questions: (exact match, F1) over the development questions. As ``classify``."""
    train = windows(tokenizer, task.train_questions, recipe.max_length)
    model = _load(AutoModelForQuestionAnswering, directory, tokenizer, place, seed)
    padding = pad_token_id(tokenizer)
    encoded = [window.encoded for window in train]

    def loss_of(model: PreTrainedModel, rows: np.ndarray) -> torch.Tensor:
        batch = collate([encoded[row] for row in rows], padding, place)
        with place.autocast():
            output = model(**batch)
        loss = torch.zeros((), device=place.device)
        for logits, name in ((output.start_logits, "start"), (output.end_logits, "end")):
            wanted = torch.tensor([getattr(train[row], name) for row in rows], device=place.device)
            loss = loss + nn.functional.cross_entropy(logits.float(), wanted) / 2
        return loss

    _train(model, encoded, loss_of, recipe, seed, progress)
    _save(model, directory, save)
    return _score(model, tokenizer, task.development_questions, recipe, place)


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    recipe: Recipe,
    place: Place,
) -> tuple[float, float]:
    tests: list[Window] = windows(tokenizer, questions, recipe.max_length)
    starts, ends = [np.empty(0)] * len(tests), [np.empty(0)] * len(tests)
    encoded = [window.encoded for window in tests]
    with torch.no_grad():
        for rows, batch in batches(encoded, TEST_TOKENS, pad_token_id(tokenizer), place):
            with place.autocast():
                output = model(**batch)
            for index, row in enumerate(rows):
                starts[row] = output.start_logits[index].float().cpu().numpy()
                ends[row] = output.end_logits[index].float().cpu().numpy()
    answers = best_answers(questions, tests, starts, ends)
    pairs = list(zip(answers, questions, strict=True))
    return (
        float(np.mean([exact_match(answer, question.answers) for answer, question in pairs])),
        float(np.mean([overlap(answer, question.answers) for answer, question in pairs])),
    )


def _load(auto_class: Any, directory: str, tokenizer: Any, place: Place, seed: int, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    try:
        model = auto_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa", **options)
    except ValueError as error:
        what = string.capwords(auto_class.__name__.removeprefix("AutoModelFor"))
        raise IsthmusError(f"model: {directory} cannot be fine-tuned: no {what} for it in transformers") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if place.device.type == "cpu":
        use_blocked_attention(model)
    return model.to(place.device)


def _save(model: PreTrainedModel, source: str, output: Path | None) -> None:
    if output is not None:
        output.mkdir(parents=True)
        with published(output) as aside:
            write_whole(model, Path(source), aside)


def _train(
    model: PreTrainedModel, encoded: list[Encoded], loss_of: LossOf, recipe: Recipe, seed: int, progress: Progress
) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # dropout, whatever loading has drawn
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    steps = [rows for _ in range(recipe.num_epochs) for rows in shuffled(encoded, recipe.batch_size, rng)]
    model.train()
    for step, rows in enumerate(steps):
        rate = learning_rate_at(
            step + 1, schedule="linear", learning_rate=recipe.learning_rate, num_steps=len(steps) + 1, warmup=WARMUP
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 and not np.isfinite(loss.item()):
            raise IsthmusError(f"fine-tuning: the loss is {loss.item()} at step {step + 1}; lower --learning-rate")
        progress((step + 1) / len(steps))
    model.eval()
