"""Questions about a passage whose answer is a span of it: SQuAD v1.1's files, windows, and official scores."""

from __future__ import annotations

import collections
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.data import read_records
from isthmus.spec.errors import IsthmusError


@dataclass(frozen=True)
class Question:
    """``answers`` are all that people gave; ``start`` is where the first one begins in ``passage``, in characters."""

    question: str
    passage: str
    answers: tuple[str, ...]
    start: int


def is_squad(source: str) -> bool:
    """Whether the file is one of SQuAD's, JSON with paragraphs, or the name is that of the data set."""
    if source.startswith("hf:"):
        return "squad" in source.lower()
    path = Path(source).expanduser()
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        return '"data"' in (head := file.read(4096)) and ("paragraphs" in head or "version" in head)


def read_questions(source: str) -> list[Question]:
    """All questions of a file in SQuAD v1.1's format, or of ``hf:NAME[:CONFIG][:SPLIT]``.

    Raises ``IsthmusError`` that names what is missing where."""
    questions = _questions_of_rows(source) if source.startswith("hf:") else _questions_of_file(source)
    if not questions:
        raise IsthmusError(f"task: {source} holds no question with an answer")
    return questions


def _questions_of_rows(source: str) -> list[Question]:
    questions = []
    for record in read_records(source):
        row: Any = record.fields
        try:
            texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
            if texts:
                questions.append(Question(row["question"], row["context"], tuple(texts), int(starts[0])))
        except (KeyError, TypeError) as error:
            raise IsthmusError(
                f"task: {record.location} lacks {error}; wanted question, context, and answers with text and "
                "answer_start, as SQuAD v1.1 has them"
            ) from error
    return questions


def _questions_of_file(source: str) -> list[Question]:
    path = Path(source).expanduser()
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise IsthmusError(f"task: {path} is not SQuAD's JSON ({error!r}); wanted an object with data") from error
    questions = []
    for number, article in enumerate(articles, start=1):
        try:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = entry["answers"]
                    texts = tuple(answer["text"] for answer in answers)
                    if texts:
                        start = int(answers[0]["answer_start"])
                        questions.append(Question(entry["question"], paragraph["context"], texts, start))
        except (KeyError, TypeError, ValueError) as error:
            raise IsthmusError(
                f"task: {path}: article {number} lacks {error}; wanted paragraphs, context, qas, question, answers, "
                "text and answer_start, as SQuAD v1.1 has them"
            ) from error
    return questions


def normalise(answer: str) -> str:
    """As the official script does: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if ``answer`` is one of ``truths`` once both are normalised, else 0."""
    return float(any(normalise(answer) == normalise(truth) for truth in truths))


def overlap(answer: str, truths: Sequence[str]) -> float:
    """The best F1 of words between ``answer`` and one of ``truths``."""
    return max(_f1(normalise(answer).split(), normalise(truth).split()) for truth in truths)


def _f1(left: list[str], right: list[str]) -> float:
    common = sum((collections.Counter(left) & collections.Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if common else 0.0
