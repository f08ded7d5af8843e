"""isthmus: fine-tune and serve large Transformers where the links are narrow.

Importing it is quick and leaves torch unloaded: what needs torch is imported at first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "infer", "tune"]

tune: Callable[..., Any]
infer: ModuleType
"""``isthmus.infer.Engine`` answers requests, on one device or several."""

_FUNCTIONS = {"tune": "isthmus.tuning.run"}
_MODULES = {"infer": "isthmus.inference"}


def __getattr__(name: str) -> Any:
    """Imports the module behind a public name when it is first asked for (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
