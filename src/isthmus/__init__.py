"""isthmus: fine-tune and serve large Transformers where the links are narrow.

Importing it is quick and leaves torch unloaded: what needs torch is imported at first use.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "decouple", "evaluate", "infer", "pretrain", "trace", "tune"]

tune: Callable[..., Any]
trace: Callable[..., Any]
decouple: Callable[..., Any]
evaluate: Callable[..., Any]
pretrain: Callable[..., Any]
infer: ModuleType
"""``isthmus.infer.Engine`` answers requests, on one device or several."""

_FUNCTIONS = {
    "tune": "isthmus.tuning.run",
    "trace": "isthmus.tuning.popularity",
    "decouple": "isthmus.decoupling.run",
    "evaluate": "isthmus.evaluation.run",
    "pretrain": "isthmus.decoupling.pretraining",
}
_MODULES = {"infer": "isthmus.inference"}


def __getattr__(name: str) -> Any:
    """Imports the module behind a public name when it is first asked for (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


_AUTO = "transformers.models.auto.configuration_auto"


class _LateEntries(dict):
    """Entries of transformers' mapping of configurations that bring decoupled models when one is first asked for."""

    def __contains__(self, model_type: object) -> bool:
        if not super().__contains__(model_type) and str(model_type).startswith("decoupled_"):
            importlib.import_module("isthmus.models.decoupled.architectures")
        return super().__contains__(model_type)


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets transformers' Auto classes know decoupled models without importing transformers, which takes seconds."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_entries(module)


def _add_entries(module: Any) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _LateEntries(mapping._extra_content)


if _AUTO in sys.modules:
    _add_entries(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _WhenImported())


def __dir__() -> list[str]:
    return sorted(__all__)
