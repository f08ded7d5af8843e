"""Training state on disk, from which a run resumes exactly: masters, Adam moments, step count, random generators.

This module owns the format. A checkpoint is a directory ``checkpoints/step-00000012`` under the output directory with

- ``units-00001.safetensors`` …: FP32, flat, ``layer.<l>.expert.<e>.master``, ``….exp_avg``, ``….exp_avg_sq`` per unit;
- ``extra.safetensors``: the trainer's own tensors (``extra.<name>``) and generators' states (``rng.torch``, …);
- ``state.json``: everything else, and the size of each file; nothing is pickled.

Each checkpoint appears whole, by a rename. Tensors are written from where they lie, one shard after the other.

Several processes (``Crew``) write one checkpoint: each the units it has, from the second process on into files that
begin with ``rank-1-`` and so on, below a directory that all of them see. Whoever resumes reads what it needs, whoever
wrote it; so their number, and who has which layer, may change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from isthmus.spec.files import atomic_directory
from isthmus.spec.model import UnitKey, UnitLayout
from isthmus.training.checkpoints import (
    SCHEMA_VERSION,
    STATE_FILE,
    CheckpointError,
    generators_state,
    read_state,
    restore_generators,
    stored_names,
    write_tensors,
)
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore
from isthmus.tuning.pipeline.company import in_one_directory
from isthmus.tuning.pipeline.links import Links

DEFAULT_SHARD_BYTES = 1 << 30
EXTRA_FILE = "extra.safetensors"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The processes that train one model together. ``layouts``: every unit of it, whoever has it."""

    links: Links
    layouts: Mapping[UnitKey, UnitLayout]


def save_training_state(
    directory: Path,
    store: ParameterStore,
    optimizer: StoreOptimizer,
    trainer_state: dict[str, Any],
    extra_tensors: Mapping[str, Tensor] | None = None,
    *,
    on_progress: Progress | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    crew: Crew | None = None,
) -> None:
    """Writes ``directory`` whole or not at all; one that is there is replaced. Blocks until it is on the disk. All of
    a ``crew`` call this.

    ``trainer_state`` is JSON (its keys become strings), ``extra_tensors`` lie on the CPU. The states of the random
    generators of Python, NumPy and torch are saved too. Raises OSError as the file system does (full disk),
    RuntimeError between ``begin_step`` and ``end_step``, TypeError where ``trainer_state`` is not JSON.
    """
    generators, generator_tensors = generators_state()
    state: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "training-state",
        "layout": _describe_layout(crew.layouts if crew else store.layouts),
        "optimizer": optimizer.state(),
        "rng": generators,
        "trainer": trainer_state,
    }
    json.dumps(state)  # what cannot be written is to fail before gigabytes have been
    extra = {f"extra.{name}": tensor for name, tensor in (extra_tensors or {}).items()}
    links = crew.links if crew else None
    rank = links.rank if links else 0
    prefix = f"rank-{rank}-" if rank else ""
    if not rank:
        extra |= generator_tensors
    total_bytes = sum(tensor.nbytes for tensor in [*_unit_tensors(store).values(), *extra.values()])
    done_bytes = 0
    with in_one_directory(atomic_directory(directory), links, "the directory of a checkpoint") as aside:
        sizes: dict[str, int] = {}
        for name, tensors in _shards(store, extra, shard_bytes):
            path = aside / f"{prefix}{name}"
            write_tensors(tensors, path)
            sizes[path.name] = path.stat().st_size
            done_bytes += sum(tensor.nbytes for tensor in tensors.values())
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
        if rank:
            _flush([aside / name for name in sizes])
        if links:
            sizes = {name: size for part in links.gather(sizes, "a checkpoint's files") for name, size in part.items()}
        if not rank:
            (aside / STATE_FILE).write_text(json.dumps(state | {"file_bytes": sizes}, indent=1) + "\n")


def _flush(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def load_training_state(
    directory: Path,
    store: ParameterStore,
    optimizer: StoreOptimizer,
    *,
    on_progress: Progress | None = None,
    crew: Crew | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fills the store and the optimizer, sets the random generators, and returns (trainer_state, extra_tensors). Units
    that the store does not have are passed over.

    Weights are the masters, rounded. Raises CheckpointError, before anything is changed, where the checkpoint is
    incomplete or was written for other units or dtypes.
    """
    state = read_state(directory)
    _require_same_layout(state["layout"], _describe_layout(crew.layouts if crew else store.layouts), directory)
    destinations = _unit_tensors(store)
    if missing := sorted(destinations.keys() - stored_names(directory, state)):
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
                elif not name.startswith("layer."):
                    rest[name] = shard.get_tensor(name).clone()
        done_bytes += num_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)
    for key in store.keys:
        store.publish(key)
    optimizer.load_state(state["optimizer"])
    restore_generators(state["rng"], rest)
    extra = {name.removeprefix("extra."): tensor for name, tensor in rest.items() if name.startswith("extra.")}
    return state["trainer"], extra


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


def _describe_layout(layouts: Mapping[UnitKey, UnitLayout]) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: a digest of every unit's tensors, and counts for the message."""
    digest = hashlib.sha256()
    counts: dict[str, int] = {}
    for key in sorted(layouts):
        layout = layouts[key]
        digest.update(f"{key.layer} {key.expert} {layout.dtype}".encode())
        for tensor in layout.tensors:
            digest.update(f" {tensor.name}{list(tensor.shape)}".encode())
        digest.update(b"\n")
        counts[layout.dtype] = counts.get(layout.dtype, 0) + layout.numel
    return {"fingerprint": digest.hexdigest(), "num_units": len(layouts), "num_parameters": counts}


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
