"""A task: examples to train on and examples to test on, of the same labels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from isthmus.data import parse_hub_name
from isthmus.evaluation.formats import Example, read_examples
from isthmus.evaluation.questions import Question, is_squad, read_questions
from isthmus.spec.errors import IsthmusError

DEVELOPMENT_SHARE = 0.2
_TRAIN_NAMES = ("train.tsv", "train.jsonl", "train.csv", "train-v1.1.json")
_DEVELOPMENT_NAMES = ("dev.tsv", "dev_matched.tsv", "dev.jsonl", "dev.csv", "dev-v1.1.json")


@dataclass(frozen=True, kw_only=True)
class Task:
    """``labels`` are in order; ``metric`` is one of ``isthmus.evaluation.metrics``. Questions have no labels."""

    name: str
    metric: str
    labels: tuple[str, ...] = ()
    train: tuple[Example, ...] = ()
    development: tuple[Example, ...] = ()
    train_questions: tuple[Question, ...] = ()
    development_questions: tuple[Question, ...] = ()
    note: str = ""
    """What was done that the user did not ask for."""

    @property
    def is_questions(self) -> bool:
        return self.metric == "squad"

    @property
    def development_texts(self) -> list[str]:
        """Texts to compare embeddings on."""
        if self.is_questions:
            return [question.question for question in self.development_questions]
        return [example.first for example in self.development]


def open_task(source: str, train: str | None = None, *, max_train: int | None = None) -> Task:
    """The task in ``source``: a file or data set to test on, or a directory with ``train`` and ``dev`` files as GLUE
    and SQuAD have them. ``train`` is what to train on; without, a file beside it, or four fifths of ``source``.

    ``max_train`` takes a sample of that many, the same at each call. Raises ``IsthmusError`` for files that cannot be
    read or used.
    """
    source, train = _files(source, train)
    if is_squad(source):
        return _questions_task(source, train, max_train)
    format_, development = read_examples(source)
    note = ""
    if train is None:
        random.Random(0).shuffle(development)
        num_development = max(1, round(len(development) * DEVELOPMENT_SHARE))
        development, examples = development[:num_development], development[num_development:]
        note = f"{source} alone: trained on {len(examples):,} of its examples, tested on the other {num_development:,}"
    else:
        train_format, examples = read_examples(train)
        if (train_format.second is None) != (format_.second is None):
            raise IsthmusError(f"train: {train} and {source} are of different kinds: texts and pairs of texts")
    labels = tuple(sorted({example.label for example in examples}))
    if len(labels) < 2:
        raise IsthmusError(
            f"train: {train or source} has {len(examples)} examples, all labelled {', '.join(labels)}; wanted two "
            "labels or more"
        )
    unknown = {example.label for example in development} - set(labels)
    if unknown:
        raise IsthmusError(
            f"task: {source} has the label {min(unknown)!r}, which {train or 'the part to train on'} never has"
        )
    return Task(
        name=format_.name,
        metric=format_.metric,
        labels=labels,
        train=tuple(_sample(examples, max_train)),
        development=tuple(development),
        note=note,
    )


def _questions_task(source: str, train: str | None, max_train: int | None) -> Task:
    questions = read_questions(source)
    note = ""
    if train is None:
        random.Random(0).shuffle(questions)
        num_development = max(1, round(len(questions) * DEVELOPMENT_SHARE))
        questions, examples = questions[:num_development], questions[num_development:]
        note = f"{source} alone: trained on {len(examples):,} of its questions, tested on the other {num_development:,}"
    else:
        examples = read_questions(train)
    return Task(
        name="squad",
        metric="squad",
        train_questions=tuple(_sample(examples, max_train)),
        development_questions=tuple(questions),
        note=note,
    )


def _sample(examples: list, max_train: int | None) -> list:
    if max_train is None or max_train >= len(examples):
        return examples
    return random.Random(1).sample(examples, max_train)


def _files(source: str, train: str | None) -> tuple[str, str | None]:
    """(to test on, to train on or None)."""
    if source.startswith("hf:"):
        name, config, split = parse_hub_name(source.removeprefix("hf:"))
        if split is None:
            validation = "validation_matched" if config == "mnli" else "validation"
            parts = f"hf:{name}:{config or ''}"
            return f"{parts}:{validation}", train or f"{parts}:train"
        return source, train
    path = Path(source).expanduser()
    if not path.is_dir():
        return source, train
    found = [
        next((name for name in names if (path / name).is_file()), None) for names in (_DEVELOPMENT_NAMES, _TRAIN_NAMES)
    ]
    if found[0] is None:
        raise IsthmusError(f"task: {path} holds none of {', '.join(_DEVELOPMENT_NAMES)}; name a file")
    return str(path / found[0]), train or (None if found[1] is None else str(path / found[1]))
