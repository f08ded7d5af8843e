"""Profiles kept between runs: one JSON file per combination of hardware, block shapes, dtype and library versions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from isthmus.spec.files import atomic_write
from isthmus.spec.profile import Profile
from isthmus.spec.serialization import from_json, to_json


def cache_directory() -> Path:
    """``$ISTHMUS_CACHE``, else ``isthmus`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if "ISTHMUS_CACHE" in os.environ:
        return Path(os.environ["ISTHMUS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isthmus"


def cached_profile(identity: Mapping[str, object], measure: Callable[[], Profile], *, refresh: bool = False) -> Profile:
    """The profile stored for ``identity`` (JSON values), or ``measure()``, then stored. An unreadable file is measured
    again."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_directory() / "profiles" / f"{digest}.json"
    if path.is_file() and not refresh:
        try:
            return from_json(Profile, path.read_text())
        except (ValueError, OSError):
            path.unlink(missing_ok=True)
    profile = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, to_json(profile))
    except OSError as error:
        print(f"isthmus: the profile could not be kept in {path.parent} ({error}); it is measured again next time")
    return profile
