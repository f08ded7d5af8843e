"""``sums.c`` from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from pathlib import Path

from isthmus.spec.compiling import load

DONE, INTERRUPTED, SILENT, OTHER = range(4)


class CSum(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("sockets", "outgoing", "incoming")],
        *[(name, c_int64) for name in ("num_steps", "num_bytes", "header_bytes", "step", "sent", "received")],
    ]


def add_up() -> Callable[..., int] | None:
    """The function, which takes a pointer to ``CSum``; None where it cannot be had (``compiling.load``)."""
    library = load(Path(__file__).with_name("sums.c"))
    if library is None:
        return None
    library.add_up.argtypes, library.add_up.restype = (ctypes.POINTER(CSum),), ctypes.c_int
    return library.add_up
