"""Labelled text in the formats in which the tasks of GLUE are published, and in plain tables.

Which it is, is seen from the first line: SST-2 (``sentence``, ``label``), CoLA (no header; source, label, mark,
sentence), MRPC (``Quality``, ``#1 String``, ``#2 String``), MNLI (``sentence1``, ``sentence2``, ``gold_label``), or any
``.tsv``, ``.csv`` or ``.jsonl`` with ``sentence`` or ``text`` (or ``sentence1`` and ``sentence2``) and ``label``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.data import Record, read_records, read_table
from isthmus.spec.errors import IsthmusError

NO_LABEL = "-"
"""MNLI's mark for a pair that its readers did not agree on."""


@dataclass(frozen=True)
class Example:
    """One labelled text, or pair of texts."""

    first: str
    second: str | None
    label: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """Where texts and label are. ``metric`` is what the task is published with."""

    name: str
    first: str
    second: str | None = None
    label: str
    metric: str = "accuracy"


FORMATS = (
    Format(name="mrpc", first="#1 String", second="#2 String", label="Quality", metric="f1"),
    Format(name="mnli", first="sentence1", second="sentence2", label="gold_label"),
    Format(name="mnli", first="premise", second="hypothesis", label="label"),
    Format(name="pairs", first="sentence1", second="sentence2", label="label"),
    Format(name="sst2", first="sentence", label="label"),
    Format(name="texts", first="text", label="label"),
)
COLA = Format(name="cola", first="sentence", label="label", metric="matthews")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")


def read_examples(source: str) -> tuple[Format, list[Example]]:
    """The format and all examples of a file, or of a Hugging Face data set (``hf:NAME[:CONFIG][:SPLIT]``).

    Raises ``IsthmusError`` that names the line for a column that is missing or a label that is empty, and for a source
    without examples.
    """
    is_cola = _is_cola(source)
    records = read_table(Path(source).expanduser(), _COLA_COLUMNS) if is_cola else read_records(source)
    format_: Format | None = COLA if is_cola else None
    examples: list[Example] = []
    for record in records:
        if format_ is None:
            format_ = _format_of(record)
        example = _example(record, format_)
        if example.label != NO_LABEL:
            examples.append(example)
    if format_ is None or not examples:
        raise IsthmusError(f"task: {source} holds no labelled example; wanted a header and at least one line")
    return format_, examples


def _is_cola(source: str) -> bool:
    """CoLA's files have no header: four columns, the second 0 or 1."""
    path = Path(source).expanduser()
    if path.suffix != ".tsv" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        fields = file.readline().rstrip("\n").split("\t")
    return len(fields) == 4 and fields[1] in ("0", "1")


def _format_of(record: Record) -> Format:
    for format_ in FORMATS:
        if {format_.first, format_.second, format_.label} - {None} <= record.fields.keys():
            return format_
    wanted = "; ".join(
        ", ".join(name for name in (format_.first, format_.second, format_.label) if name) for format_ in FORMATS
    )
    raise IsthmusError(
        f"task: {record.location} has the columns {', '.join(map(str, record.fields))}; wanted one of: {wanted}"
    )


def _example(record: Record, format_: Format) -> Example:
    values: Mapping[str, object] = record.fields
    names: Sequence[str] = [name for name in (format_.first, format_.second, format_.label) if name is not None]
    for name in names:
        if values.get(name) is None or str(values[name]).strip() == "":
            raise IsthmusError(f"task: {record.location}: the column {name!r} is missing or empty")
    second = None if format_.second is None else str(values[format_.second])
    return Example(str(values[format_.first]), second, str(values[format_.label]).strip())
