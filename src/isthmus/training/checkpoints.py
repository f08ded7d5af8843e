"""Checkpoints of a training run: a directory for each, which appears whole; finding, pruning, and random generators.

``checkpoints/step-00000012`` below the output directory holds safetensors files and ``state.json``, which names the
size of each file; nothing is pickled. What they hold is the runtime's matter; ``save_state`` and ``load_state`` are for
those whose tensors all fit one file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_directory, recover_directory

SCHEMA_VERSION = 1
STATE_FILE = "state.json"
_TENSORS_FILE = "tensors.safetensors"
_STEP_DIRECTORY = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\..*")


class CheckpointError(IsthmusError):
    """A checkpoint is incomplete, of another version, or of another model. Nothing has been loaded from it."""


def checkpoint_directory(output_directory: Path, step: int) -> Path:
    """Where the state after ``step`` steps belongs."""
    return output_directory / "checkpoints" / f"step-{step:08d}"


def save_state(directory: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes ``directory`` whole or not at all: ``tensors`` (none of them shared), ``state`` (JSON) and the random
    generators' states. Blocks until it is on the disk. Raises OSError as the file system does."""
    generators, generator_tensors = generators_state()
    whole = {"schema_version": SCHEMA_VERSION, "kind": "training-state", "rng": generators, "trainer": dict(state)}
    json.dumps(whole)  # what cannot be written is to fail before gigabytes have been
    with atomic_directory(directory) as aside:
        write_tensors(
            {**{name: tensor.contiguous() for name, tensor in tensors.items()}, **generator_tensors},
            aside / _TENSORS_FILE,
        )
        sizes = {_TENSORS_FILE: (aside / _TENSORS_FILE).stat().st_size}
        (aside / STATE_FILE).write_text(json.dumps(whole | {"file_bytes": sizes}, indent=1) + "\n")


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_state`` was given, and sets the random generators. Raises CheckpointError for a broken one."""
    whole = read_state(directory)
    try:
        tensors = load_file(directory / _TENSORS_FILE)
    except SafetensorError as error:
        raise CheckpointError(
            f"{directory / _TENSORS_FILE}: damaged ({error}); resume from another checkpoint"
        ) from error
    restore_generators(whole["rng"], tensors)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}, whole["trainer"]


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose files all have their full size; else CheckpointError says what is wrong."""
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from another checkpoint") from error
    if state.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version is {state.get('schema_version')!r}, this version reads {SCHEMA_VERSION}; "
            "resume with the version of isthmus that wrote it"
        )
    for name, num_bytes in state["file_bytes"].items():
        shard = directory / name
        found_bytes = shard.stat().st_size if shard.is_file() else 0
        if found_bytes != num_bytes:
            raise CheckpointError(
                f"{shard}: {found_bytes} of {num_bytes} bytes are there, the file is truncated or missing; "
                "resume from another checkpoint"
            )
    return state


def find_resumable(output_directory: Path, *, notify: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none at all. Clears away what a killed save left.

    ``notify(message)`` is told of each broken checkpoint that is passed over. Raises CheckpointError where there are
    checkpoints but all are broken: starting anew must be the user's decision.
    """
    parent = output_directory / "checkpoints"
    if not parent.is_dir():
        return None
    for interrupted in {match[1] for entry in parent.iterdir() if (match := _LEFTOVER.fullmatch(entry.name))}:
        recover_directory(parent / interrupted)
    candidates = _checkpoints(output_directory)
    for directory in reversed(candidates):
        try:
            read_state(directory)
        except CheckpointError as error:
            notify(f"passing over a broken checkpoint: {error}")
        else:
            return directory
    if candidates:
        raise CheckpointError(f"{parent}: none of {len(candidates)} checkpoints is whole; start anew with --overwrite")
    return None


def prune_checkpoints(output_directory: Path, *, keep: int = 2) -> None:
    """Removes all but the ``keep`` newest checkpoints of a run. To be called after a save."""
    if keep < 1:
        raise ValueError(f"keep: got {keep}, want at least 1 checkpoint to stay")
    for directory in _checkpoints(output_directory)[:-keep]:
        (directory / STATE_FILE).unlink(missing_ok=True)  # first: half removed, it must not look whole
        shutil.rmtree(directory)


def _checkpoints(output_directory: Path) -> list[Path]:
    """Checkpoint directories of a run, oldest first."""
    parent = output_directory / "checkpoints"
    entries = parent.iterdir() if parent.is_dir() else ()
    found = {int(match[1]): entry for entry in entries if (match := _STEP_DIRECTORY.fullmatch(entry.name))}
    return [found[step] for step in sorted(found)]


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def stored_names(directory: Path, state: dict[str, Any]) -> set[str]:
    """Names of the stored tensors, from the headers alone; raises CheckpointError on a damaged one."""
    names: set[str] = set()
    for file_name in state["file_bytes"]:
        path = directory / file_name
        try:
            with safe_open(path, "pt") as shard:
                names.update(shard.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error}); resume from another checkpoint") from error
    return names


def generators_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of the generators of Python and NumPy (JSON), and of torch (tensors)."""
    version, words, gauss = random.getstate()
    generator = numpy.random.get_state(legacy=False)
    words_of_numpy = generator["state"] | {"key": generator["state"]["key"].tolist()}
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"python": [version, list(words), gauss], "numpy": generator | {"state": words_of_numpy}}, tensors


def restore_generators(generators: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = generators["numpy"]
    key = numpy.array(numpy_state["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    torch.set_rng_state(tensors["rng.torch"])
    for number in range(torch.cuda.device_count()):
        if f"rng.cuda.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{number}"], number)
