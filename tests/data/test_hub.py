"""Hugging Face data sets: names are understood, saved ones are read, failures say what was asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from isthmus.data.records import read_records
from isthmus.spec.errors import IsthmusError

datasets = pytest.importorskip("datasets")
ROWS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:imdb", ("imdb", None, "train")),
        ("openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("hf:openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("hf:imdb:test", ("imdb", None, "test")),
        ("hf:imdb:train[:10%]", ("imdb", None, "train[:10%]")),
        ("hf:openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("hf:openai/gsm8k:main:train[5:]", ("openai/gsm8k", "main", "train[5:]")),
    ],
)
def test_names_are_split_into_name_config_and_split(
    name: str, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    def load(path: str, config: str | None, *, split: str) -> Any:
        calls.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = list(read_records(name))
    assert calls == [asked]
    assert [record.fields for record in records] == ROWS
    assert records[0].location.endswith("row 1") and records[-1].share_read == 1.0


def test_what_the_hub_does_not_have_says_that_it_is_no_file_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> Any:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        IsthmusError, match=r"'nobody' is neither a file nor a directory.*split train\): no such data set"
    ):
        read_records("nobody")


def test_the_missing_extra_names_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(IsthmusError, match=r'pip install "isthmus\[data\]"'):
        read_records("hf:imdb")


def test_saved_data_sets_are_read_from_their_directory(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    splits = {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "many"))
    for name in ("one", "many"):
        assert [record.fields for record in read_records(tmp_path / name)] == ROWS


def test_saved_splits_without_train_ask_for_one(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"a": part, "b": part}).save_to_disk(str(tmp_path))
    with pytest.raises(IsthmusError, match="holds the splits a, b, and none is called train"):
        read_records(tmp_path)


def test_a_saved_data_set_without_rows_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path))
    with pytest.raises(IsthmusError, match="is empty or cannot be read"):
        list(read_records(tmp_path))


def test_an_empty_name_shows_a_good_one() -> None:
    with pytest.raises(IsthmusError, match="wanted hf:NAME"):
        read_records("hf:")
