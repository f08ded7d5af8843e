"""What a record means: one document, a prompt with its completion, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.data.record import Record
from isthmus.spec.errors import IsthmusError

WANTED = "messages, or prompt and completion, or text"


@dataclass(frozen=True)
class Document:
    """Every token of ``text`` counts."""

    text: str


@dataclass(frozen=True)
class Completion:
    """Only the tokens of ``completion`` count."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Only the assistant's turns count. Messages are as chat templates take them: ``role``, ``content``, …"""

    messages: Sequence[Mapping[str, Any]]
    location: str


def interpret(record: Record, columns: Sequence[str] | None) -> Document | Completion | Conversation:
    """What the fields of ``record`` say.

    Without ``columns``: ``messages``, else ``prompt`` and ``completion``, else ``text``; fields that are null count as
    missing. With ``columns``: two are prompt and completion; one is a text, or a conversation where its value is a
    list.

    Raises ``IsthmusError`` naming the record's place, the fields that were found and the fix.
    """
    present = {name for name, value in record.fields.items() if value is not None}
    if columns is None:
        wanted = next((names for names in _KNOWN if present.issuperset(names)), None)
    else:
        wanted = tuple(columns) if present.issuperset(columns) else None
    if wanted is None:
        raise IsthmusError(
            f"data: {record.location} has the fields {', '.join(sorted(present)) or '(none)'}, "
            f"wanted {WANTED if columns is None else ' and '.join(columns)}; "
            "name the ones to use: --columns PROMPT,COMPLETION or --columns TEXT"
        )
    if len(wanted) == 2:
        return Completion(_text(record, wanted[0]), _text(record, wanted[1]))
    value = record.fields[wanted[0]]
    if isinstance(value, list) or wanted == ("messages",):
        return Conversation(_messages(record, wanted[0]), record.location)
    return Document(_text(record, wanted[0]))


_KNOWN = (("messages",), ("prompt", "completion"), ("text",))


def parse_columns(columns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """``question,answer`` (or the names one by one) as names. Raises ``IsthmusError`` unless there are one or two."""
    if columns is None:
        return None
    names = tuple(name.strip() for name in (columns.split(",") if isinstance(columns, str) else columns))
    if len(names) not in (1, 2) or not all(names) or len(set(names)) != len(names):
        raise IsthmusError(
            f"columns: got {','.join(names)!r}, wanted PROMPT,COMPLETION (two different fields) or TEXT (one field)"
        )
    return names


def _text(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str):
        raise IsthmusError(f"data: {record.location}: the field {name} is of type {type(value).__name__}, wanted text")
    return value


def _messages(record: Record, name: str) -> Sequence[Mapping[str, Any]]:
    value = record.fields[name]
    if not isinstance(value, list) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    ):
        raise IsthmusError(
            f"data: {record.location}: the field {name} is not a conversation, "
            'wanted a list such as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
        )
    return value
