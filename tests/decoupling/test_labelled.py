"""``isthmus decouple --task``: the original learns the task, the copy learns to classify as it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.decoupling.conftest import WORDS, sentences, tokenizer
from transformers import AutoModelForSequenceClassification

from isthmus.decoupling.labelled import texts_of
from isthmus.decoupling.run import decouple
from isthmus.evaluation.formats import Example
from isthmus.evaluation.tasks import Task
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import DecoupleReport, TaskScore
from isthmus.training.batches import fixed_batches

FAST: dict[str, Any] = {
    "sub_blocks": 2,
    "dtype": "fp32",
    "device": "cpu",
    "plain": True,
    "epochs": 3,
    "batch_tokens": 256,
}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    for name, count, seed in (("train.tsv", 800, 1), ("dev.tsv", 60, 2)):
        lines = sentences(count, seed)
        labelled = [f"{line}\t{'yes' if WORDS[0] in line.split() else 'no'}" for line in lines]
        (folder / name).write_text("\n".join(["sentence\tlabel", *labelled]) + "\n")
    return folder


def test_the_copy_classifies_as_the_fine_tuned_original(encoder: Path, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = decouple(encoder, output=output, task=str(task), steps=100, **FAST)
    assert isinstance(report, DecoupleReport) and isinstance(report.score, TaskScore)
    assert (report.score.task, report.score.metric) == ("sst2", "accuracy")
    models = [AutoModelForSequenceClassification.from_pretrained(path) for path in (output / "original", output)]
    assert [type(model).__name__ for model in models] == [
        "BertForSequenceClassification",
        "DecoupledBertForSequenceClassification",
    ]
    assert models[1].config.id2label == {0: "no", 1: "yes"}
    batch = tokenizer()(sentences(100, 3), padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs, ours = (model.eval()(**batch).logits.argmax(dim=1) for model in models)
    assert (ours == theirs).float().mean() >= 0.9


def test_a_resumed_run_keeps_its_original(encoder: Path, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    decouple(encoder, output=output, task=str(task), steps=2, **FAST)
    written = (output / "original" / "model.safetensors").stat().st_mtime_ns
    decouple(encoder, output=output, task=str(task), steps=4, resume=True, **FAST)
    assert (output / "original" / "model.safetensors").stat().st_mtime_ns == written


def test_pairs_keep_their_token_types() -> None:
    examples = (Example("ban ber", "ker", "0"), Example("bas", "bat", "1"))
    typed = tokenizer()
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = texts_of(typed, Task(name="pairs", metric="accuracy", train=examples), 16)
    batch = fixed_batches([*texts, np.array([2, 9, 3], np.int32)], 64, 0)[0]
    assert batch["token_type_ids"].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5, 6]


def test_questions_are_refused(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    answer = {"text": "ban", "answer_start": 0}
    entry = {"id": "1", "question": "ban", "answers": [answer]}
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": "ban ber", "qas": [entry] * 9}]}]})
    )
    with pytest.raises(IsthmusError, match=r"task: .*dev\.json has questions; a copy is distilled for classification"):
        decouple(encoder, output=tmp_path / "out", task=str(path), steps=2, **FAST)
