"""``isthmus demo``: a working example on this machine, pictures included."""

from __future__ import annotations

from isthmus.errors import IsthmusError


def demo() -> None:
    """Fine-tune a small model on real text on this machine, compare the policies, draw what waited for what."""
    raise IsthmusError("demo: not there yet; use `isthmus tune MODEL --data FILE --output DIR`")
