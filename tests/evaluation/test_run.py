"""``isthmus evaluate``: tasks are learnt, models get the same recipe, the report holds what was asked."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.decoupling.conftest import WORDS, decoder, encoder, sentences, text, tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.decoupling.run import decouple
from isthmus.evaluation import finetuning
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.encoding import Place
from isthmus.evaluation.finetuning import Recipe
from isthmus.evaluation.perplexity import masked_perplexity
from isthmus.evaluation.questions import Question
from isthmus.evaluation.run import evaluate
from isthmus.evaluation.spans import best_answers, windows
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import EvaluateReport
from isthmus.spec.serialization import from_json

__all__ = ["decoder", "encoder", "text"]
PLACE = Place(torch.device("cpu"), "fp32")
FAST: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "num_seeds": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences labelled by whether a certain word is in them."""
    folder = tmp_path_factory.mktemp("task")
    for name, count, seed in (("train.tsv", 400, 1), ("dev.tsv", 60, 2)):
        lines = sentences(count, seed)
        labelled = [f"{line}\t{int(any(word in line.split() for word in WORDS[:3]))}" for line in lines]
        (folder / name).write_text("\n".join(["sentence\tlabel", *labelled]) + "\n")
    return folder


@pytest.fixture(scope="module")
def decoupled(encoder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("decoupled") / "out"
    decouple(encoder, output=output, text=[text], sub_blocks=2, steps=30, dtype="fp32", device="cpu", plain=True)
    return output


def test_original_and_decoupled_learn_the_task_side_by_side(
    encoder: Path, decoupled: Path, task: Path, tmp_path: Path
) -> None:
    recipe = Recipe(num_epochs=8, learning_rate=1e-3)
    report = evaluate([encoder, decoupled], tasks=[str(task)], recipe=recipe, report=tmp_path / "r.json", **FAST)
    rows = {(row.model, row.metric): row for row in report.rows}
    for model, num_sub_blocks, originals in ((encoder, 1, (0, 1, 2)), (decoupled, 2, (2,))):
        row = rows[str(model), "accuracy"]
        assert row.mean > 0.85 and row.num_seeds == 2 and row.task == "sst2"
        assert (row.num_sub_blocks, row.original_layers) == (num_sub_blocks, originals)
        assert rows[str(model), "probe accuracy"].mean > 0.7
    assert rows[str(decoupled), "cosine"].mean > 0.5 and (str(encoder), "cosine") not in rows
    assert from_json(EvaluateReport, (tmp_path / "r.json").read_text()) == report


def test_every_model_sees_the_same_batches_and_a_seed_fixes_all(
    encoder: Path, decoupled: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    shuffled = finetuning.shuffled

    def spying(encoded: Any, batch_size: int, rng: Any) -> list[np.ndarray]:
        found = shuffled(encoded, batch_size, rng)
        seen.append([rows.tolist() for rows in found])
        return found

    monkeypatch.setattr(finetuning, "shuffled", spying)
    reports = [
        evaluate([encoder, decoupled], tasks=[str(task)], methods=["finetune"], max_train=64, **FAST) for _ in range(2)
    ]
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]
    assert reports[0].rows == reports[1].rows


def test_embeddings_are_means_over_the_tokens_of_each_text(encoder: Path) -> None:
    model, texts = AutoModel.from_pretrained(encoder).eval(), sentences(20)
    vectors = embed(model, tokenizer(), texts, place=PLACE)
    for row in range(0, 20, 6):
        with torch.no_grad():
            hidden = model(**tokenizer()(texts[row], return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(vectors[row], hidden[0].mean(dim=0).numpy(), atol=1e-5)


def test_causal_perplexity_is_that_of_a_plain_loop(decoder: Path, text: Path) -> None:
    report = evaluate([decoder], text=[str(text)], recipe=Recipe(max_length=32), **FAST)
    ids = tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"] + [tokenizer().eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    losses: list[float] = []
    for start in range(0, len(ids), 32):
        window = torch.tensor([ids[start : start + 32]])
        if window.shape[1] > 1:
            with torch.no_grad():
                logits = model(window).logits[0, :-1]
            losses += F.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
    assert report.rows[0].metric == "perplexity"
    assert report.rows[0].mean == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_masked_perplexity_masks_the_same_for_every_model(encoder: Path) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM.from_pretrained(encoder).eval()
    first, again, other = (
        masked_perplexity(model, tokenizer(), sentences(30), seq_len=32, place=PLACE, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other and 1 < first < 1000


def test_spans_of_windows_are_answers_again() -> None:
    passage = " ".join(sentences(12))
    answer = " ".join(passage.split()[40:43])
    question = Question("ban ker", passage, (answer,), passage.index(answer))
    found = windows(tokenizer(), [question], 32)
    assert len(found) > 3 and any(window.start for window in found)
    starts, ends = [], []
    for window in found:
        assert len(window.encoded["input_ids"]) <= 32
        start, end = np.zeros(len(window.offsets)), np.zeros(len(window.offsets))
        if window.start:
            start[window.start] = end[window.end] = 5.0
        starts.append(start)
        ends.append(end)
    assert best_answers([question], found, starts, ends) == [answer]


def test_questions_are_fine_tuned_on(encoder: Path, tmp_path: Path) -> None:
    articles = []
    for passage in sentences(40):
        word = passage.split()[1]
        qa = {"id": "1", "question": word, "answers": [{"text": word, "answer_start": passage.index(word)}]}
        articles.append({"paragraphs": [{"context": passage, "qas": [qa]}]})
    path = tmp_path / "dev-v1.1.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    report = evaluate([encoder], tasks=[str(path)], recipe=Recipe(max_length=32), **FAST)
    assert [(row.task, row.metric) for row in report.rows] == [("squad", "exact_match"), ("squad", "f1")]
    assert all(0 <= row.mean <= 1 for row in report.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"task: nothing to evaluate on; give --task FILE, or --text FILE"),
        ({"methods": ["probe"]}, r"task: finetune and probe need --task FILE"),
        ({"methods": ["perplexity"]}, r"text: perplexity needs --text FILE"),
        ({"methods": ["guess"]}, r"methods: got 'guess', wanted some of finetune, probe, fidelity, perplexity"),
        ({"tasks": ["nothing.tsv"]}, r"data: nothing.tsv does not exist"),
        ({"recipe": Recipe(learning_rate=-1)}, r"learning_rate: got -1, wanted more than 0"),
    ],
)
def test_what_cannot_work_is_refused(encoder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        evaluate([encoder], **{**FAST, **options})


def test_command_line_shows_a_table(encoder: Path, decoupled: Path, task: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(encoder), str(decoupled), "--task", str(task), "--methods", "probe,fidelity"]
    result = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "r.json"), "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert "probe accuracy" in result.stdout and "spearman" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "evaluate"


def test_fine_tuned_models_are_kept_and_answer_as_they_did(
    encoder: Path, decoupled: Path, task: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": [str(task)], "methods": ["finetune"], "max_train": 64, **FAST, "num_seeds": 1}
    said = io.StringIO()
    report = evaluate([encoder, decoupled], save=tmp_path / "kept", console=Console(file=said), **options)
    for row in report.rows:
        assert f"{row.model}: sst2, seed 0: accuracy {row.mean:.4f}\n" in said.getvalue()
        directory = tmp_path / "kept" / Path(row.model).name / "sst2-seed-0"
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        lines = [line.split("\t") for line in (task / "dev.tsv").read_text().splitlines()[1:]]
        with torch.no_grad():
            right = [
                model(**AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")).logits.argmax().item()
                == int(label)
                for text, label in lines
            ]
        assert np.mean(right) == pytest.approx(row.mean, abs=0.02)
    with pytest.raises(IsthmusError, match=r"kept/.* is there already; remove it or name another directory"):
        evaluate([encoder], save=tmp_path / "kept", **options)
    with pytest.raises(IsthmusError, match=r"save: got models .*, wanted each name once"):
        evaluate([encoder, encoder], save=tmp_path / "other", **options)
