"""Checkpoint directories that ``from_pretrained`` loads, with the names ``save_pretrained`` gives: of a whole model,
and of one whose units are streamed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from isthmus.models.checkpoint_keys import CheckpointKeys, CheckpointTensor, persistent_buffers
from isthmus.models.moe_model import MoeModel
from isthmus.models.safetensors_file import TensorToWrite, write_safetensors
from isthmus.models.sentence import copy_pooling
from isthmus.models.skeleton import torch_dtype
from isthmus.spec.model import UnitKey

Source = Callable[[UnitKey], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of several processes that write one checkpoint: ``rank_of(layer)`` says who writes a layer's tensors. Rank 0
    writes buffers and all that is not tensors."""

    rank: int
    rank_of: Callable[[int], int]

    def of(self, tensor: CheckpointTensor) -> int:
        unit = tensor.pieces[0].unit
        return 0 if unit is None else self.rank_of(unit.layer)


_GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files as they are."""
    names = {file.name for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}
    for name in sorted(names):
        shutil.copyfile(source / name, target / name)


def write_whole(model: PreTrainedModel, source: Path, target: Path) -> None:
    """Writes ``model`` into the directory ``target``, with the tokenizer and whatever else belongs to the checkpoint
    ``source`` that it comes from."""
    implementation = str(model.config._attn_implementation)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(target)
    model.set_attn_implementation(implementation)
    copy_tokenizer(source, target)
    copy_pooling(source, target)


def write_checkpoint(
    path: Path,
    model: MoeModel,
    source: Source,
    *,
    dtype: str,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_from: Path | None,
    share: Share | None = None,
) -> None:
    """Writes all units, ``model``'s persistent buffers and its configuration into the existing, empty directory
    ``path``.

    ``source(key)`` returns the unit's tensors by name with the layout's shapes, on any device. ``dtype`` (``fp32``,
    ``bf16``) is what they are cast to; parameters that the model keeps in FP32 stay FP32. ``tokenizer_from`` is a
    directory (usually the original checkpoint) whose tokenizer files and generation_config.json are copied. With
    ``share`` only this process's share is written, in files of its own; the checkpoint is whole when all have returned.
    Beside the units, one chunk of one tensor is in memory at a time. Raises ``ValueError`` for a bad ``path`` or
    ``max_shard_bytes``, ``OSError`` on a full disk. Blocks.
    """
    if not path.is_dir() or (share is None and any(path.iterdir())):
        raise ValueError(f"path: {path} must be an existing, empty directory")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, wanted a positive number")
    share = share or Share(rank=0, rank_of=lambda layer: 0)
    shards = _shards(CheckpointKeys(model), model, torch_dtype(dtype), max_shard_bytes, share)
    buffers = persistent_buffers(model)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        to_write = [tensor for tensor, _ in shard]
        if share.of(shard[0][1]) == share.rank:
            write_safetensors(path / name, to_write, (_pieces(origin, source, buffers) for _, origin in shard))
        file_of |= {tensor.key: name for tensor in to_write}
    if share.rank:
        return
    if len(shards) > 1:
        total_bytes = sum(tensor.num_bytes for shard in shards for tensor, _ in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    _write_config(path, model, dtype)
    _write_tokenizer(path, model, tokenizer_from)


_Shard = list[tuple[TensorToWrite, CheckpointTensor]]


def _shards(
    keys: CheckpointKeys, model: MoeModel, dtype: torch.dtype, max_shard_bytes: int, share: Share
) -> list[_Shard]:
    """All tensors, by who writes them in execution order, cut where a shard would grow beyond ``max_shard_bytes`` (a
    larger tensor is alone in one) or be two processes'."""
    shards: list[_Shard] = [[]]
    shard_bytes = 0
    for tensor in sorted(keys.saved.values(), key=share.of):
        unit = tensor.pieces[0].unit
        keeps_dtype = unit is None or model.layouts[unit].dtype != model.dtype
        to_write = TensorToWrite(key=tensor.key, shape=tensor.shape, dtype=tensor.dtype if keeps_dtype else dtype)
        is_anothers = bool(shards[-1]) and share.of(shards[-1][0][1]) != share.of(tensor)
        if is_anothers or (shards[-1] and shard_bytes + to_write.num_bytes > max_shard_bytes):
            shards.append([])
            shard_bytes = 0
        shards[-1].append((to_write, tensor))
        shard_bytes += to_write.num_bytes
    return shards


def _pieces(tensor: CheckpointTensor, source: Source, buffers: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for piece in tensor.pieces:
        owner = buffers if piece.unit is None else source(piece.unit)
        whole = owner[piece.tensor]
        yield whole if whole.dim() == 0 else whole[piece.first_row : piece.first_row + piece.num_rows]


def _write_config(path: Path, model: MoeModel, dtype: str) -> None:
    config = copy.deepcopy(model.module.config)
    config.dtype = str(torch_dtype(dtype)).removeprefix("torch.")
    config.architectures = [model.spec.architecture]
    config.save_pretrained(path)


def _write_tokenizer(path: Path, model: MoeModel, tokenizer_from: Path | None) -> None:
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, path)
    if tokenizer_from is not None and (tokenizer_from / _GENERATION).is_file():
        shutil.copyfile(tokenizer_from / _GENERATION, path / _GENERATION)
    elif model.module.generation_config is not None:
        model.module.generation_config.save_pretrained(path)
