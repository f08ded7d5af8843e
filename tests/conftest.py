"""What every test may ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from isthmus.transport.rendezvous import held_port

# No test may depend on how fast the machine is.
settings.register_profile("isthmus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of shared data: ``ISTHMUS_SHARED``, or ``shared`` beside the repository. Skips without it."""
    default = Path(__file__).parent.parent.parent / "shared"
    folder = Path(os.environ.get("ISTHMUS_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is no directory; set ISTHMUS_SHARED to the one that holds data/")
    return folder


@pytest.fixture
def port() -> Iterator[int]:
    """Where processes of this test can meet; no other test is given it meanwhile."""
    with held_port() as port:
        yield port


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
