"""Profiles kept between runs: one JSON file per combination of hardware, block shapes, dtype and library versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from isthmus.spec.files import atomic_write, cache_directory
from isthmus.spec.profile import Profile
from isthmus.spec.serialization import from_json, to_json

Measured = TypeVar("Measured")


def cached_profile(identity: Mapping[str, object], measure: Callable[[], Profile], *, refresh: bool = False) -> Profile:
    """The profile stored for ``identity`` (JSON values), or ``measure()``, then stored. An unreadable file is measured
    again."""
    found = None if refresh else find(Profile, identity)
    if found is None:
        found = measure()
        keep(identity, found)
    return found


def find(kind: type[Measured], identity: Mapping[str, object]) -> Measured | None:
    """What was stored for ``identity`` (JSON values), a ``kind`` of ``spec``; None if nothing was, or it is unreadable
    (then it is removed)."""
    path = _path(identity)
    if not path.is_file():
        return None
    try:
        return from_json(kind, path.read_text())
    except (ValueError, OSError):
        path.unlink(missing_ok=True)
        return None


def keep(identity: Mapping[str, object], measured: object) -> None:
    """Stores ``measured`` for ``find``. Where that is not possible it says so and goes on."""
    path = _path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, to_json(measured))
    except OSError as error:
        print(f"isthmus: the profile could not be kept in {path.parent} ({error}); it is measured again next time")


def _path(identity: Mapping[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory() / "profiles" / f"{digest}.json"
