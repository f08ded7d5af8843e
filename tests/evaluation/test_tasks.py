"""Tasks in their published formats are read, and what is wrong with a file is said with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.evaluation.formats import Example, read_examples
from isthmus.evaluation.tasks import open_task
from isthmus.spec.errors import IsthmusError

FILES = {
    "sst2": ("sentence\tlabel\nit 's \"good\t1\nbad film\t0\n", Example("it 's \"good", None, "1"), "accuracy"),
    "cola": ("gj04\t1\t\tWe talked.\ngj04\t0\t*\tTalked we.\n", Example("We talked.", None, "1"), "matthews"),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said.\tHe spoke.\n0\t1\t2\tA\tB\n",
        Example("He said.", "He spoke.", "1"),
        "f1",
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA man.\tA person.\tx\tentailment\n1\tA\tB\tx\t-\n"
        "2\tA\tC\tx\tneutral\n",
        Example("A man.", "A person.", "entailment"),
        "accuracy",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_published_formats_are_recognised(name: str, tmp_path: Path) -> None:
    content, first, metric = FILES[name]
    path = tmp_path / "dev.tsv"
    path.write_text(content)
    format_, examples = read_examples(str(path))
    assert (format_.name, format_.metric, examples[0], len(examples)) == (name, metric, first, 2)


def test_json_lines_and_csv_are_tasks_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x y", "label": "pos"}\n{"text": "z", "label": "neg"}\n')
    (tmp_path / "a.csv").write_text('sentence,label\n"one, two",1\nthree,0\n')
    assert read_examples(str(tmp_path / "a.jsonl"))[1][0] == Example("x y", None, "pos")
    assert read_examples(str(tmp_path / "a.csv"))[1][0] == Example("one, two", None, "1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tscore\nx\t1\n", r"task: .*dev.tsv:2 has the columns text, score; wanted one of: .*sentence, label"),
        ("sentence\tlabel\nx\t1\ny\n", r"data: .*dev.tsv:3 has 1 fields, wanted 2: sentence, label"),
        ("sentence\tlabel\nx\t1\ny\t\n", r"task: .*dev.tsv:3: the column 'label' is missing or empty"),
        ("sentence\tlabel\n", r"task: .*dev.tsv holds no labelled example"),
        ("a\t1\t\tx y\nb\t0\n", r"data: .*dev.tsv:2 has 2 fields, wanted 4: source, label, mark, sentence"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text(content)
    with pytest.raises(IsthmusError, match=message):
        read_examples(str(tmp_path / "dev.tsv"))


def table(labels: str) -> str:
    return "sentence\tlabel\n" + "".join(f"text {number}\t{label}\n" for number, label in enumerate(labels))


def test_a_directory_has_both_files(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(table("0101"))
    (tmp_path / "dev.tsv").write_text(table("01"))
    task = open_task(str(tmp_path))
    assert (len(task.train), len(task.development), task.labels, task.note) == (4, 2, ("0", "1"), "")


def test_a_file_alone_is_split_the_same_way_each_time(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(table("01" * 20))
    task = open_task(str(tmp_path / "x.tsv"))
    assert (len(task.train), len(task.development)) == (32, 8)
    assert not set(task.train) & set(task.development)
    assert "alone: trained on 32 of its examples, tested on the other 8" in task.note
    assert open_task(str(tmp_path / "x.tsv")) == task
    assert len(open_task(str(tmp_path / "x.tsv"), max_train=5).train) == 5


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("1111", r"train: .*train.tsv has 4 examples, all labelled 1; wanted two labels or more"),
        ("1313", r"task: .*dev.tsv has the label '0', which .*train.tsv never has"),
    ],
)
def test_labels_must_fit(train: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(table(train))
    (tmp_path / "dev.tsv").write_text(table("01"))
    with pytest.raises(IsthmusError, match=message):
        open_task(str(tmp_path))


def squad(**qa: Any) -> str:
    entry = {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 3}]} | qa
    return json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": "So Ann came.", "qas": [entry]}]}]})


def test_squad_is_read_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dev-v1.1.json"
    path.write_text(squad())
    task = open_task(str(path), str(path))
    assert task.is_questions and task.development_questions[0].answers == ("Ann",)
    path.write_text(squad().replace("answer_start", "begin"))
    with pytest.raises(IsthmusError, match=r"article 1 lacks 'answer_start'; wanted paragraphs, context"):
        open_task(str(path), str(path))


def test_lines_end_where_a_line_ends(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("\ufeffsentence\tlabel\na \x85 b\t1\r\nc\t0\n", newline="")
    assert read_examples(str(tmp_path / "dev.tsv"))[1] == [Example("a \x85 b", None, "1"), Example("c", None, "0")]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:glue:sst2", [("glue", "sst2", "validation"), ("glue", "sst2", "train")]),
        ("hf:glue:mnli", [("glue", "mnli", "validation_matched"), ("glue", "mnli", "train")]),
        ("hf:someone/reviews", [("someone/reviews", None, "validation"), ("someone/reviews", None, "train")]),
        ("hf:glue:sst2:test", [("glue", "sst2", "test")]),
    ],
)
def test_data_sets_of_the_hub_have_their_splits(name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load(path: str, config: str | None, *, split: str) -> Any:
        calls.append((path, config, split))
        columns = {"premise": "a", "hypothesis": "b"} if config == "mnli" else {"sentence": "a"}
        return datasets.Dataset.from_list([columns | {"label": label} for label in (0, 1) * 5])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = open_task(name)
    assert calls == asked
    assert (task.development[0].second == "b") == name.endswith("mnli")


def test_squad_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    row = {"question": "Who?", "context": "So Ann came.", "answers": {"text": ["Ann"], "answer_start": [3]}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    task = open_task("hf:rajpurkar/squad")
    assert task.is_questions and task.development_questions[0].start == 3
