"""isthmus: fine-tune and serve large Transformers where the links are narrow.

Importing it is quick and leaves torch unloaded: what needs torch is imported at first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "tune"]

tune: Callable[..., Any]

_LAZY = {"tune": "isthmus.tuning.run"}


def __getattr__(name: str) -> Any:
    """Imports the module behind a public name when it is first asked for (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
