"""Reading training data: a file, a directory or a Hugging Face data set becomes a stream of records.

A record is one JSON object (or one whole text file) together with where it came from, so that every later complaint can
name the line. Nothing is tokenised here, and no more than one file (a ``.json`` file: all of it) is in memory at a
time.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from isthmus.data.hub import is_saved_dataset, read_hub_dataset, read_saved_dataset
from isthmus.data.record import Record
from isthmus.spec.errors import IsthmusError

TEXT_SUFFIXES = (".txt", ".md", ".py")
DIRECTORY_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
TABLE_DELIMITERS = {".tsv": "\t", ".csv": ","}
SUFFIXES = (".jsonl", ".json", *TABLE_DELIMITERS, *TEXT_SUFFIXES)


def read_records(source: str | Path) -> Iterator[Record]:
    """The records of ``source``, in a fixed order.

    - ``.jsonl``: one object per line, empty lines are skipped. ``.json``: a list of objects, or ``{"data": [...]}``.
    - ``.txt``, ``.md``, ``.py``: the whole file is one document, ``{"text": ...}``. Blank lines separate paragraphs far
      more often than documents, and a model should see across them; for many short documents use ``.jsonl``.
    - ``.tsv`` and ``.csv``: the first line names the columns. Quotes mean nothing in ``.tsv``, as in GLUE's files.
    - a directory: every ``.txt``, ``.md``, ``.py`` and ``.jsonl`` below it in the order of their paths, hidden ones
      left out; or, if ``datasets`` saved it there (``save_to_disk``), that data set.
    - ``hf:NAME[:CONFIG][:SPLIT]``, or a plain name that cannot be a path: a Hugging Face data set.

    Raises ``IsthmusError`` for what is missing, of an unknown kind or malformed, naming file and line.
    """
    name = str(source)
    path = Path(source).expanduser()
    if name.startswith("hf:"):
        return read_hub_dataset(name.removeprefix("hf:"))
    if path.is_dir():
        return read_saved_dataset(path) if is_saved_dataset(path) else _read_directory(path)
    if path.exists():
        return _read_file(path)
    if _is_path_like(source):
        raise IsthmusError(
            f"data: {name} does not exist (looked from {Path.cwd()}); "
            "give a file, a directory, or hf:NAME for a Hugging Face data set"
        )
    return read_hub_dataset(name)


def _is_path_like(source: str | Path) -> bool:
    """Whether what does not exist was meant as a path: Hugging Face names are ``name`` or ``owner/name``."""
    path = Path(source)
    return (
        isinstance(source, Path)
        or re.fullmatch(r"\.[A-Za-z]+", path.suffix) is not None
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _read_directory(directory: Path) -> Iterator[Record]:
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in DIRECTORY_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not files:
        raise IsthmusError(f"data: the directory {directory} holds none of {', '.join(DIRECTORY_SUFFIXES)}")
    sizes = [path.stat().st_size for path in files]
    num_bytes, num_bytes_before = max(1, sum(sizes)), 0
    for path, size in zip(files, sizes, strict=True):
        for record in _read_file(path):
            yield replace(record, share_read=(num_bytes_before + record.share_read * size) / num_bytes)
        num_bytes_before += size


def _read_file(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_json_lines(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix in TABLE_DELIMITERS:
        return read_table(path)
    if suffix in TEXT_SUFFIXES:
        return iter([Record({"text": _decode(path.read_bytes(), path)}, str(path), 1.0)])
    raise IsthmusError(
        f"data: {path} has the suffix {suffix or '(none)'}, wanted one of {', '.join(SUFFIXES)}; "
        "convert it to .jsonl, or give hf:NAME for a Hugging Face data set"
    )


def _read_json_lines(path: Path) -> Iterator[Record]:
    num_bytes, num_bytes_read = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            location = f"{path}:{number}"
            num_bytes_read += len(line)
            text = _decode(line, location)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise IsthmusError(
                    f"data: {location} is not JSON ({error.msg}, column {error.colno}): {_shorten(text)}; "
                    "a .jsonl file holds one JSON object per line"
                ) from None
            yield Record(_require_object(value, location), location, num_bytes_read / num_bytes)


def read_table(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows of a ``.tsv`` or ``.csv`` file. ``columns`` names them where the first line does not."""
    num_bytes = max(1, path.stat().st_size)
    delimiter = TABLE_DELIMITERS[path.suffix.lower()]
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(_decode(path.read_bytes(), path), newline=""), delimiter=delimiter, quoting=quoting)
    header = columns or next(rows, None)
    if header is None:
        return
    num_bytes_read = 0
    for row in rows:
        location = f"{path}:{rows.line_num}"
        if not row:
            continue
        if len(row) != len(header):
            raise IsthmusError(f"data: {location} has {len(row)} fields, wanted {len(header)}: {', '.join(header)}")
        num_bytes_read += sum(map(len, row)) + len(row)
        yield Record(dict(zip(header, row, strict=True)), location, min(1.0, num_bytes_read / num_bytes))


def _read_json(path: Path) -> Iterator[Record]:
    try:
        value = json.loads(_decode(path.read_bytes(), path))
    except json.JSONDecodeError as error:
        raise IsthmusError(
            f"data: {path}:{error.lineno} is not JSON ({error.msg}, column {error.colno}); "
            "if every line is an object of its own, name the file .jsonl"
        ) from None
    if isinstance(value, dict):
        value = value.get("data", value)
    if not isinstance(value, list):
        found = f"an object with the keys {', '.join(value) or '(none)'}" if isinstance(value, dict) else _kind(value)
        raise IsthmusError(f'data: {path} holds {found}, wanted a list of objects or {{"data": [...]}}')
    for number, item in enumerate(value, start=1):
        location = f"{path}: item {number}"
        yield Record(_require_object(item, location), location, number / len(value))


def _require_object(value: object, location: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise IsthmusError(f'data: {location} is {_kind(value)}, wanted an object with fields, such as {{"text": "…"}}')
    return value


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


def _decode(data: bytes, location: object) -> str:
    try:
        # Some editors begin a file with a byte order mark.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IsthmusError(
            f"data: {location} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert it to UTF-8"
        ) from None


def _shorten(text: str, length: int = 60) -> str:
    text = text.strip()
    return repr(text if len(text) <= length else text[:length] + "…")
