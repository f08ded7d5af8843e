"""Streams a Hugging Face checkpoint into the units' memory, without a second copy of the model. Quantised weights are
dequantised on the way (``quantisation``)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from isthmus.models.checkpoint_files import checkpoint_files, some_of
from isthmus.models.checkpoint_keys import CheckpointKeys, Piece, persistent_buffers
from isthmus.models.moe_model import MoeModel
from isthmus.models.quantisation import read_quantisation, stored_weights
from isthmus.models.quantisation.base import StoredWeights
from isthmus.models.safetensors_file import SafetensorsReader
from isthmus.spec.model import UnitKey

Destination = Callable[[UnitKey], dict[str, torch.Tensor]]


@dataclass
class _Progress:
    """What is read so far. ``filled_rows`` are ranges of rows by unit and tensor, ``unexpected`` checkpoint names."""

    report: Callable[[float], None]
    total_bytes: int
    done_bytes: int = 0
    filled_rows: dict[tuple[UnitKey | None, str], list[tuple[int, int]]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        self.report(self.done_bytes / self.total_bytes)

    def fill(self, piece: Piece) -> None:
        rows = (piece.first_row, piece.first_row + piece.num_rows)
        self.filled_rows.setdefault((piece.unit, piece.tensor), []).append(rows)

    def is_filled(self, piece: Piece) -> bool:
        """Whether a tensor that was read held all of these rows."""
        last_row = piece.first_row + piece.num_rows
        filled = self.filled_rows.get((piece.unit, piece.tensor), ())
        return any(first <= piece.first_row and last_row <= last for first, last in filled)


def read_checkpoint(
    path: Path, model: MoeModel, destination: Destination, *, progress: Callable[[float], None] | None = None
) -> None:
    """Reads the checkpoint in directory ``path`` into what ``destination`` gives for each unit, and into ``model``'s
    persistent buffers.

    ``destination(key)`` returns the unit's tensors by name: contiguous CPU views with the layout's shapes, FP32 or
    bf16, which are overwritten (values are cast); units that the model does not hold (``MoeModel.restrict``) are passed
    over. Beside them, a chunk of one tensor is in memory at a time, or one
    expert as it is stored. Tensors of layers beyond the model's are skipped. ``progress`` gets the share of bytes done,
    0 to 1.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for a truncated or foreign one and for missing or
    wrong-shaped tensors; warns of tensors that the model has no place for. Blocks.
    """
    keys = CheckpointKeys(model)
    files = checkpoint_files(path)
    state = _Progress(report=progress or (lambda share: None), total_bytes=sum(file.stat().st_size for file in files))
    buffers = persistent_buffers(model)
    with ExitStack() as stack:
        # All are open at once: a quantised weight and its scales may lie in different files.
        readers = [stack.enter_context(SafetensorsReader(file)) for file in files]
        weights = stored_weights(readers, read_quantisation(path))
        for reader in readers:
            for key in sorted(reader.tensors, key=lambda key: reader.tensors[key].begin_byte):
                _read_tensor(key, weights, keys, model, destination, buffers, state)
    _require_all(path, keys, state)
    if state.unexpected:
        warnings.warn(
            f"checkpoint: {path} has {len(state.unexpected)} tensors that {model.spec.architecture} has no place for, "
            f"skipped: {some_of(state.unexpected)}",
            stacklevel=2,
        )
    state.report(1.0)


def _read_tensor(
    key: str,
    weights: StoredWeights,
    keys: CheckpointKeys,
    model: MoeModel,
    destination: Destination,
    buffers: dict[str, torch.Tensor],
    state: _Progress,
) -> None:
    name = weights.weight_name(key)
    tensor = None if name is None else keys.find(name)
    if tensor is None:
        if name is not None and not _is_left_out(name, keys, model):
            state.unexpected.append(key)
    elif (shape := weights.shape(key)) != tensor.shape:
        raise ValueError(
            f"checkpoint: {key} in {weights.file(key)} has shape {shape}, wanted {tensor.shape} "
            f"({model.spec.architecture} by its config.json)"
        )
    else:
        for number, piece in enumerate(tensor.pieces):
            state.fill(piece)
            if piece.unit is not None and piece.unit not in model.held_layouts:
                continue
            owner = buffers if piece.unit is None else destination(piece.unit)
            whole = owner[piece.tensor]
            part = whole if whole.dim() == 0 else whole[piece.first_row : piece.first_row + piece.num_rows]
            weights.read_into(key, part, number * (math.prod(tensor.shape) // len(tensor.pieces)))
    state.advance(weights.stored(key).num_bytes)


def _is_left_out(key: str, keys: CheckpointKeys, model: MoeModel) -> bool:
    """Whether a tensor has no place on purpose: transformers ignores it too, or its layer was not asked for."""
    name = keys.module_name(key)
    patterns = (
        *(model.module._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    )
    if any(re.search(pattern, name) for pattern in patterns):
        return True
    stacks = {layer.rpartition(".")[0] for layer in model.layer_names}
    for stack in stacks:
        beyond = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
        if beyond and f"{stack}.{beyond[1]}" not in model.layer_names:
            return True
    return False


def _require_all(path: Path, keys: CheckpointKeys, state: _Progress) -> None:
    # In the saved format tensors are smallest, so what is missing can be told whichever format was read.
    missing = [tensor.key for tensor in keys.saved.values() if not all(map(state.is_filled, tensor.pieces))]
    if missing:
        raise ValueError(f"checkpoint: {path} lacks {len(missing)} of {len(keys.saved)} tensors: {some_of(missing)}")
