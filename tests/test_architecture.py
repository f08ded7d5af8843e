"""The rules of the house, read from the source: who may import whom, no cycles, no tricks, no long files or functions.

The rules are in ``docs/architecture.md``. Every rule is also tested on a small tree that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "isthmus"

_RUNTIME = {"spec", "planning", "simulation", "models", "profiling", "reporting", "transport", "data", "training"}
# What each part may import of isthmus besides itself. A part that does not exist yet is no error.
MAY_IMPORT = {
    "spec": set[str](),
    "planning": {"spec"},
    "simulation": {"spec", "planning"},
    "models": {"spec"},
    "transport": {"spec"},
    "reporting": {"spec"},
    "data": {"spec"},
    "training": {"spec", "reporting"},
    "evaluation": {"spec", "models", "reporting", "data", "training"},
    "profiling": {"spec", "models", "planning", "transport"},
    "tuning": _RUNTIME,
    "inference": _RUNTIME,
    "decoupling": _RUNTIME | {"evaluation"},
    "testbed": {"spec", "transport"},
    "serving": _RUNTIME | {"inference"},
}
SEES_EVERYTHING = {"__init__", "__main__", "cli"}
# Packages that import nothing from outside the standard library but what is named.
MAY_INSTALL = {
    "spec": set[str](),
    "planning": {"numpy"},
    "simulation": {"numpy"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Module:
    name: str
    """``isthmus.spec.model``; a package's ``__init__.py`` has the package's name."""
    path: Path
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """``spec`` for all of ``isthmus.spec``, ``files`` for ``isthmus.spec.files``, ``__init__`` for the root."""
        return part_of(self.name)


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def read_modules(source: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        modules[name] = Module(name=name, path=path, text=text, tree=ast.parse(text))
    return modules


def imported_names(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in the file, inside functions too; names of isthmus resolved to modules."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in modules else node.module


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "isthmus"


def layer_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.part in SEES_EVERYTHING:
            continue
        if module.part not in MAY_IMPORT:
            yield f"{module.name}: isthmus.{module.part} is in no layer: give it one here and in docs/architecture.md"
            continue
        allowed = MAY_IMPORT[module.part] | {module.part}
        for line, name in imported_names(module, modules):
            if is_ours(name) and part_of(name) not in allowed:
                yield f"{module.name}:{line} imports {name}: {module.part} may import only {sorted(allowed)}"


def third_party_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for line, name in imported_names(module, modules):
            package = name.split(".")[0]
            if (
                module.part in MAY_INSTALL
                and not is_ours(name)
                and package not in sys.stdlib_module_names | MAY_INSTALL[module.part]
            ):
                yield f"{module.name}:{line} imports {package}: {module.part} must do without"


def cycle_violations(modules: dict[str, Module]) -> Iterator[str]:
    graph = {
        module.name: {name for _, name in imported_names(module, modules) if name in modules and name != module.name}
        for module in modules.values()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"import cycle: {' -> '.join(error.args[1])}"


def hides_an_import(call: ast.Call) -> bool:
    """Whether ``call`` imports by name something that is, or may be, ours (``import_module("datasets")`` is not)."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    name = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    return function in ("import_module", "__import__") and (not isinstance(name, str) or is_ours(name))


def trick_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            place = f"{module.name}:{getattr(node, 'lineno', 0)}"
            names = {getattr(node, "id", None), getattr(node, "attr", None)}
            if isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
                if node.level:
                    yield f"{place} relative import: write the absolute one"
            if "TYPE_CHECKING" in names:
                yield f"{place} TYPE_CHECKING: import it, or move what both need down"
            if isinstance(node, ast.Call) and module.part not in SEES_EVERYTHING and hides_an_import(node):
                yield f"{place} imports by a name that this test cannot read: write an import statement"


def length_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        num_lines = len(module.text.splitlines())
        if num_lines >= MAX_FILE_LINES:
            yield f"{module.name}: {num_lines} lines, wanted under {MAX_FILE_LINES}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{module.name}:{node.lineno} {node.name}"
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines >= MAX_FUNCTION_LINES:
                    yield f"{place}: {num_lines} lines, wanted under {MAX_FUNCTION_LINES}"


def docstring_violations(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.text.strip() and not ast.get_docstring(module.tree):
            yield f"{module.name}: no docstring that says what the module owns"


Check = Callable[[dict[str, Module]], Iterator[str]]
CHECKS: list[Check] = [
    layer_violations,
    third_party_violations,
    cycle_violations,
    trick_violations,
    length_violations,
    docstring_violations,
]


@pytest.mark.parametrize("check", CHECKS)
def test_source_keeps_the_rules(check: Check) -> None:
    modules = read_modules(SOURCE)
    assert "isthmus" in modules and "isthmus.spec.model" in modules
    assert list(check(modules)) == []


def test_layers_themselves_have_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


BREACHES = [
    (layer_violations, "planning/rule.py", "import isthmus.tuning.wave", "rule:2 imports isthmus.tuning.wave"),
    (layer_violations, "planning/rule.py", "from isthmus.tuning import wave", "rule:2 imports isthmus.tuning.wave"),
    (layer_violations, "spec/a.py", "from isthmus.planning.rule import x", "a:2 imports isthmus.planning.rule"),
    (layer_violations, "models/a.py", "def f():\n    import isthmus.profiling", "a:3 imports isthmus.profiling"),
    (layer_violations, "reporting/a.py", "from isthmus import tune", "a:2 imports isthmus: reporting may import only"),
    (layer_violations, "inference/a.py", "import isthmus.tuning", "a:2 imports isthmus.tuning"),
    (layer_violations, "helpers/a.py", "", "isthmus.helpers is in no layer"),
    (third_party_violations, "spec/a.py", "import numpy", "a:2 imports numpy: spec must do without"),
    (third_party_violations, "planning/a.py", "from torch.nn import Linear", "a:2 imports torch: planning must"),
    (cycle_violations, "tuning/wave.py", "from isthmus.tuning import other", "isthmus.tuning.other"),
    (cycle_violations, "tuning/wave.py", "def f():\n    import isthmus.tuning.other", "isthmus.tuning.other"),
    (trick_violations, "tuning/a.py", "from typing import TYPE_CHECKING", "a:2 TYPE_CHECKING"),
    (trick_violations, "tuning/a.py", "import typing\nif typing.TYPE_CHECKING:\n    pass", "a:3 TYPE_CHECKING"),
    (trick_violations, "tuning/a.py", "from . import wave", "a:2 relative import"),
    (
        trick_violations,
        "tuning/a.py",
        "import importlib\nimportlib.import_module('isthmus.cli')",
        "a:3 imports by a name",
    ),
    (trick_violations, "tuning/a.py", "name = 'isthmus.cli'\n__import__(name)", "a:3 imports by a name"),
    (length_violations, "tuning/a.py", "x = 1\n" * 398, "a: 400 lines, wanted under 400"),
    (length_violations, "tuning/a.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 59, "a:3 f: 60 lines"),
]


def fake_tree(folder: Path, extra: dict[str, str]) -> Path:
    source = folder / "isthmus"
    files = {
        "__init__.py": "import importlib",
        "spec/files.py": "import os",
        "spec/model.py": "from isthmus.spec.files import x",
        "planning/rule.py": "import numpy\nfrom isthmus.spec.model import y",
        "tuning/wave.py": "import torch\nimport isthmus.planning.rule",
        "tuning/other.py": "from isthmus.tuning.wave import z\nimport importlib\nimportlib.import_module('datasets')",
        "cli/main.py": "import isthmus\nimport isthmus.tuning.wave",
    } | extra
    for name, body in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""A module."""\n{body}\n')
    return source


@pytest.mark.parametrize("check", CHECKS)
def test_small_tree_that_keeps_the_rules_passes(check: Check, tmp_path: Path) -> None:
    longest = {"tuning/long.py": "x = 1\n" * 300 + "def f():\n" + "    x = 1\n" * 58}
    assert list(check(read_modules(fake_tree(tmp_path, longest)))) == []


@pytest.mark.parametrize(("check", "name", "body", "message"), BREACHES)
def test_breach_is_caught(check: Check, name: str, body: str, message: str, tmp_path: Path) -> None:
    violations = list(check(read_modules(fake_tree(tmp_path, {name: body}))))
    assert len(violations) == 1
    assert message in violations[0]


def test_missing_docstring_is_caught_and_an_empty_file_needs_none(tmp_path: Path) -> None:
    source = fake_tree(tmp_path, {})
    (source / "spec" / "__init__.py").write_text("")
    (source / "spec" / "model.py").write_text("x = 1\n")
    assert list(docstring_violations(read_modules(source))) == [
        "isthmus.spec.model: no docstring that says what the module owns"
    ]


TORCH_FREE = ("spec", "planning", "simulation", "cli")


def test_planning_simulation_and_the_command_line_leave_torch_unloaded() -> None:
    names = [name for name, module in read_modules(SOURCE).items() if module.part in (*TORCH_FREE, "__init__")]
    script = f"""
        import importlib, sys
        for name in {names!r}:
            importlib.import_module(name)
            assert not sys.modules.keys() & {{"torch", "transformers"}}, f"{{name}} loads torch"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
