"""Training state on disk, from which a run resumes exactly: masters, Adam moments, step count, random generators.

This module owns the format. A checkpoint is a directory ``checkpoints/step-00000012`` under the output directory with

- ``units-00001.safetensors`` …: FP32, flat, ``layer.<l>.expert.<e>.master``, ``….exp_avg``, ``….exp_avg_sq`` per unit;
- ``extra.safetensors``: the trainer's own tensors (``extra.<name>``) and generators' states (``rng.torch``, …);
- ``state.json``: everything else, and the size of each file; nothing is pickled.

Each checkpoint appears whole, by a rename. Tensors are written from where they lie, one shard after the other.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_directory, recover_directory
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore

SCHEMA_VERSION = 1
DEFAULT_SHARD_BYTES = 1 << 30
STATE_FILE = "state.json"
EXTRA_FILE = "extra.safetensors"

_STEP_DIRECTORY = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\..*")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class CheckpointError(IsthmusError):
    """A checkpoint is incomplete, of another version, or of another model. Nothing has been loaded from it."""


def checkpoint_directory(output_directory: Path, step: int) -> Path:
    """Where the state after ``step`` steps belongs."""
    return output_directory / "checkpoints" / f"step-{step:08d}"


def save_training_state(
    directory: Path,
    store: ParameterStore,
    optimizer: StoreOptimizer,
    trainer_state: dict[str, Any],
    extra_tensors: Mapping[str, Tensor] | None = None,
    *,
    on_progress: Progress | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes ``directory`` whole or not at all; one that is there is replaced. Blocks until it is on the disk.

    ``trainer_state`` is JSON (its keys become strings), ``extra_tensors`` lie on the CPU. The states of the random
    generators of Python, NumPy and torch are saved too. Raises OSError as the file system does (full disk),
    RuntimeError between ``begin_step`` and ``end_step``, TypeError where ``trainer_state`` is not JSON.
    """
    generators, generator_tensors = _random_state()
    state: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "training-state",
        "layout": _describe_layout(store),
        "optimizer": optimizer.state(),
        "rng": generators,
        "trainer": trainer_state,
    }
    json.dumps(state)  # what cannot be written is to fail before gigabytes have been
    extra = {f"extra.{name}": tensor for name, tensor in (extra_tensors or {}).items()} | generator_tensors
    total_bytes = sum(tensor.nbytes for tensor in [*_unit_tensors(store).values(), *extra.values()])
    done_bytes = 0
    with atomic_directory(directory) as aside:
        sizes: dict[str, int] = {}
        for name, tensors in _shards(store, extra, shard_bytes):
            _write(tensors, aside / name)
            sizes[name] = (aside / name).stat().st_size
            done_bytes += sum(tensor.nbytes for tensor in tensors.values())
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
        (aside / STATE_FILE).write_text(json.dumps(state | {"file_bytes": sizes}, indent=1) + "\n")


def load_training_state(
    directory: Path,
    store: ParameterStore,
    optimizer: StoreOptimizer,
    *,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fills the store and the optimizer, sets the random generators, and returns (trainer_state, extra_tensors).

    Weights are the masters, rounded. Raises CheckpointError, before anything is changed, where the checkpoint is
    incomplete or was written for other units or dtypes.
    """
    state = read_state(directory)
    _require_same_layout(state["layout"], _describe_layout(store), directory)
    destinations = _unit_tensors(store)
    if missing := sorted(destinations.keys() - _stored_names(directory, state)):
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, {missing[0]} first; resume from another"
        )
    total_bytes, done_bytes = sum(state["file_bytes"].values()), 0
    rest: dict[str, Tensor] = {}
    for file_name, num_bytes in state["file_bytes"].items():
        with safe_open(directory / file_name, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                if name in destinations:
                    destinations[name].copy_(shard.get_tensor(name))
                else:
                    rest[name] = shard.get_tensor(name).clone()
        done_bytes += num_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    for key in store.keys:
        store.publish(key)
    optimizer.load_state(state["optimizer"])
    _restore_random_state(state["rng"], rest)
    extra = {name.removeprefix("extra."): tensor for name, tensor in rest.items() if name.startswith("extra.")}
    return state["trainer"], extra


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


def _unit_tensors(store: ParameterStore) -> dict[str, Tensor]:
    """Name in the file → the store's own FP32 tensor."""
    return {
        f"layer.{key.layer}.expert.{key.expert}.{kind}": flat(key)
        for key in store.keys
        for kind, flat in (("master", store.master), ("exp_avg", store.exp_avg), ("exp_avg_sq", store.exp_avg_sq))
    }


def _shards(
    store: ParameterStore, extra: dict[str, Tensor], shard_bytes: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file name, its tensors), a new file once ``shard_bytes`` are reached."""
    number, shard, num_bytes = 1, {}, 0
    for name, tensor in _unit_tensors(store).items():
        if shard and num_bytes + tensor.nbytes > shard_bytes:
            yield f"units-{number:05d}.safetensors", shard
            number, shard, num_bytes = number + 1, {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    yield f"units-{number:05d}.safetensors", shard
    yield EXTRA_FILE, extra


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _stored_names(directory: Path, state: dict[str, Any]) -> set[str]:
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


def _describe_layout(store: ParameterStore) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: a digest of every unit's tensors, and counts for the message."""
    digest = hashlib.sha256()
    counts: dict[str, int] = {}
    for key in store.keys:
        layout = store.layout(key)
        digest.update(f"{key.layer} {key.expert} {layout.dtype}".encode())
        for tensor in layout.tensors:
            digest.update(f" {tensor.name}{list(tensor.shape)}".encode())
        digest.update(b"\n")
        counts[layout.dtype] = counts.get(layout.dtype, 0) + layout.numel
    return {"fingerprint": digest.hexdigest(), "num_units": len(store.keys), "num_parameters": counts}


def _require_same_layout(saved: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    if saved["fingerprint"] == wanted["fingerprint"]:
        return
    told = [
        f"{layout['num_units']} units, " + " + ".join(f"{n} {dtype}" for dtype, n in layout["num_parameters"].items())
        for layout in (saved, wanted)
    ]
    raise CheckpointError(
        f"{directory}: was written for another model or dtype: {told[0]} parameters; this model: {told[1]} parameters; "
        "resume with the model and the dtype that wrote it, or start anew with --overwrite"
    )


def _random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of the generators of Python and NumPy (JSON), and of torch (tensors)."""
    version, words, gauss = random.getstate()
    generator = numpy.random.get_state(legacy=False)
    words_of_numpy = generator["state"] | {"key": generator["state"]["key"].tolist()}
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"python": [version, list(words), gauss], "numpy": generator | {"state": words_of_numpy}}, tensors


def _restore_random_state(generators: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = generators["numpy"]
    key = numpy.array(numpy_state["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    torch.set_rng_state(tensors["rng.torch"])
    for number in range(torch.cuda.device_count()):
        if f"rng.cuda.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{number}"], number)
