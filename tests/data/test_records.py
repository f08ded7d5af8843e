"""Every source gives its records in order and names the place of whatever is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.data.records import read_records
from isthmus.spec.errors import IsthmusError


def fields_of(source: str | Path) -> list[object]:
    return [record.fields for record in read_records(source)]


def test_every_json_form_gives_the_same_records(tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    rows = [{"text": "one"}, {"text": "zwei ü"}]
    lines = write_lines(*rows)
    lines.write_text("\ufeff" + lines.read_text() + "\n  \n")
    plain, wrapped = tmp_path / "plain.json", tmp_path / "wrapped.json"
    plain.write_text(json.dumps(rows))
    wrapped.write_text(json.dumps({"version": 1, "data": rows}))
    assert fields_of(lines) == fields_of(str(plain)) == fields_of(wrapped) == rows


def test_a_text_file_is_one_document_with_its_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("first\n\nsecond\n\n\nthird\n")
    assert fields_of(path) == [{"text": "first\n\nsecond\n\n\nthird\n"}]


def test_a_directory_is_read_in_the_order_of_paths_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "b/z.py": "pass",
        "a.md": "# A",
        "c.jsonl": '{"text": "line"}',
        "config.json": "{}",
        "picture.png": "",
        ".git/x.txt": "hidden",
    }.items():
        (tmp_path / name).write_text(text)
    records = list(read_records(tmp_path))
    assert [record.fields["text"] for record in records] == ["# A", "pass", "line"]
    shares = [record.share_read for record in records]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_the_share_read_rises_to_one(write_lines: Callable[..., Path]) -> None:
    shares = [record.share_read for record in read_records(write_lines({"text": "a"}, {"text": "b"}))]
    assert shares == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', r"bad\.jsonl:2 is not JSON .*one JSON object per line"),
        ("list.jsonl", b'["text"]\n', r"list\.jsonl:1 is of type list, wanted an object"),
        ("bytes.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', r"bytes\.jsonl:2 is not UTF-8 \(byte 10 is 0xff\)"),
        ("bad.json", b'[\n{"text": "a"},\n}', r"bad\.json:3 is not JSON .*name the file \.jsonl"),
        ("keys.json", b'{"train": []}', r"keys\.json holds an object with the keys train, wanted a list"),
        ("number.json", b"3", r"number\.json holds of type int"),
        ("items.json", b'[{"text": "a"}, 7]', r"items\.json: item 2 is of type int"),
        ("table.csv", b"text,label\na,b\nc\n", r"table\.csv:3 has 1 fields, wanted 2: text, label"),
        ("table.bin", b"a,b", r"table\.bin has the suffix \.bin, wanted one of \.jsonl, \.json, \.tsv, \.csv, \.txt"),
        ("nothing", b"a,b", r"has the suffix \(none\)"),
    ],
)
def test_malformed_files_name_the_place_and_the_fix(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(IsthmusError, match=message):
        list(read_records(path))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "~/missing", "/missing", "a/b/c", "missing.txt"])
def test_a_missing_path_is_never_taken_for_the_name_of_a_data_set(name: str) -> None:
    with pytest.raises(IsthmusError, match=rf"{re.escape(name)} does not exist"):
        read_records(name)


def test_a_missing_file_in_an_existing_directory_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsthmusError, match="data/train does not exist"):
        read_records("data/train")


def test_a_directory_without_data_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"holds none of \.txt, \.md, \.py, \.jsonl"):
        list(read_records(tmp_path))
