"""Hugging Face data sets as rows: by name from the hub (or its local cache), or as ``save_to_disk`` left them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.data.record import Record
from isthmus.spec.errors import IsthmusError

DEFAULT_SPLIT = "train"


def read_hub_dataset(name: str) -> Iterator[Record]:
    """Every row of ``NAME[:CONFIG][:SPLIT]``, as ``datasets.load_dataset`` gives them.

    With one part after the name, it is a split if it begins like one (``train``, ``validation``, ``test``, also with a
    slice: ``train[:10%]``), else a config. The split is ``train`` unless one is named. Downloads what is not in the
    cache.

    Raises ``IsthmusError`` if the extra ``data`` is not installed or the data set cannot be loaded.
    """
    path, config, split = parse_hub_name(name)
    split = split or DEFAULT_SPLIT
    try:
        dataset = _datasets().load_dataset(path, config, split=split)
    except (OSError, ValueError) as error:
        raise IsthmusError(
            f"data: {name!r} is neither a file nor a directory, and not a Hugging Face data set that could be loaded "
            f"(name {path}, config {config or '(default)'}, split {split}): {error}"
        ) from error
    return _rows(dataset, name)


def is_saved_dataset(path: Path) -> bool:
    """Whether ``datasets`` saved a data set, or a dictionary of them, in the directory ``path``."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def read_saved_dataset(path: Path) -> Iterator[Record]:
    """Every row that ``save_to_disk`` wrote to ``path``; of several splits, of ``train``.

    Raises ``IsthmusError`` if there are several splits and none is called ``train``, or one cannot be read.
    """
    try:
        dataset = _datasets().load_from_disk(str(path))
    except (OSError, ValueError, IndexError) as error:
        # datasets cannot read back a data set without rows: IndexError.
        raise IsthmusError(f"data: the data set saved in {path} is empty or cannot be read: {error}") from error
    if isinstance(dataset, dict):
        splits = list(dataset)
        split = splits[0] if len(splits) == 1 else DEFAULT_SPLIT
        if split not in dataset:
            raise IsthmusError(
                f"data: {path} holds the splits {', '.join(splits)}, and none is called {DEFAULT_SPLIT}; "
                f"give one of them, such as {path / splits[0]}"
            )
        dataset = dataset[split]
    return _rows(dataset, str(path))


def parse_hub_name(name: str) -> tuple[str, str | None, str | None]:
    """(path, config, split) of ``NAME[:CONFIG][:SPLIT]``, None where it names none."""
    path, *rest = name.split(":", 2)
    if not path:
        raise IsthmusError(f"data: got 'hf:{name}', wanted hf:NAME[:CONFIG][:SPLIT], such as hf:openai/gsm8k:main")
    if len(rest) == 2 and not _is_split(rest[0]):
        return path, rest[0] or None, rest[1] or None
    # A slice has a colon of its own, so name:train[:10%] has two parts but no config.
    only = ":".join(rest)
    return (path, None, only) if _is_split(only) else (path, only or None, None)


def _is_split(part: str) -> bool:
    return re.match(r"(train|validation|test)\b", part) is not None


def _rows(dataset: Any, name: str) -> Iterator[Record]:
    return (Record(row, f"{name}: row {number}", number / len(dataset)) for number, row in enumerate(dataset, start=1))


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise IsthmusError(
            "data: Hugging Face data sets need the package datasets, which is not installed; "
            'pip install "isthmus[data]", or give a .jsonl file'
        ) from None
