"""Fields mean a document, a completion or a conversation; anything else names the record, what it has and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.data.record import Record
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data.fields import Completion, Conversation, Document, interpret, parse_columns

MESSAGES = [{"role": "user", "content": "hi"}]


def record(**fields: Any) -> Record:
    return Record(fields, "a.jsonl:7", 1.0)


@pytest.mark.parametrize(
    ("fields", "columns", "meaning"),
    [
        ({"text": "t", "id": 3}, None, Document("t")),
        ({"prompt": "p", "completion": "c", "text": "t"}, None, Completion("p", "c")),
        ({"prompt": None, "completion": "c", "text": "t"}, None, Document("t")),
        ({"messages": MESSAGES, "prompt": "p", "completion": "c"}, None, Conversation(MESSAGES, "a.jsonl:7")),
        ({"question": "q", "answer": "a", "text": "t"}, "question, answer", Completion("q", "a")),
        ({"body": "b", "text": "t"}, ["body"], Document("b")),
        ({"chat": MESSAGES}, "chat", Conversation(MESSAGES, "a.jsonl:7")),
    ],
)
def test_fields_mean_what_they_say(fields: dict[str, Any], columns: Any, meaning: object) -> None:
    assert interpret(record(**fields), parse_columns(columns)) == meaning


@pytest.mark.parametrize(
    ("fields", "columns", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            None,
            "a.jsonl:7 has the fields answer, question, wanted messages, or prompt and completion, or text; .*--colu",
        ),
        ({"question": "q"}, "question,answer", "has the fields question, wanted question and answer"),
        ({}, None, r"has the fields \(none\)"),
        ({"text": 3}, None, "a.jsonl:7: the field text is of type int, wanted text"),
        ({"messages": "hi"}, None, "the field messages is not a conversation"),
        ({"messages": [{"content": "hi"}]}, None, "the field messages is not a conversation"),
    ],
)
def test_a_record_that_does_not_fit_names_its_line_and_the_fix(
    fields: dict[str, Any], columns: Any, message: str
) -> None:
    with pytest.raises(IsthmusError, match=message):
        interpret(record(**fields), parse_columns(columns))


@pytest.mark.parametrize("columns", ["", "a,", "a,b,c", "a,a", []])
def test_columns_are_one_or_two_different_names(columns: Any) -> None:
    with pytest.raises(IsthmusError, match=r"columns: got .* wanted PROMPT,COMPLETION"):
        parse_columns(columns)
