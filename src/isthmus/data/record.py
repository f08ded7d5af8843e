"""One record of training data, as every source gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """The fields of one example as they were found."""

    fields: Mapping[str, Any]
    location: str
    """Its place for people, such as ``a.jsonl:12``."""
    share_read: float
    """Of the whole source, once this record is read: 0 … 1."""
