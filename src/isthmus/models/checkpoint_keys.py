"""Which tensor of a checkpoint file holds which part of which unit, in either of the two formats that occur.

- The *saved* format is what ``save_pretrained`` writes and what the Hub has: one tensor per expert and projection
  for most families. transformers' own conversion objects (``conversion_mapping.py``) say how its names come from
  module names.
- The *module* format has module names: fused experts in one tensor (E, …).

For Switch, NLLB-MoE and gpt-oss the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
)

from isthmus.models.layouts import expert_names
from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.spec.model import TensorSpec, UnitKey


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows ``first_row`` … ``first_row + num_rows`` (along dimension 0) of a unit's tensor; ``unit`` is ``None`` for
    a buffer."""

    unit: UnitKey | None
    tensor: str
    first_row: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class CheckpointTensor:
    """A tensor of a checkpoint: its pieces lie in it one after the other, all of the same size."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class CheckpointKeys:
    """The names of ``model``'s tensors in a checkpoint. ``saved`` and ``fused`` are keyed by name, in execution order;
    each of them alone covers every parameter and every persistent buffer once."""

    def __init__(self, model: MoeModel) -> None:
        """Raises ``ValueError`` for a family whose conversion is more than merging and concatenating experts."""
        self._model = model
        transforms = get_model_conversion_mapping(model.module, add_legacy=True)
        saved = get_model_conversion_mapping(model.module, add_legacy=False)
        # As save_pretrained does for a model that it did not load itself.
        saved = [transform for transform in saved if not isinstance(transform, PrefixChange)]
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        backwards = [(transform, transform.reverse_transform()) for transform in saved[::-1]]
        self._converters = [(there, back) for there, back in backwards if isinstance(there, WeightConverter)]
        self._to_saved = [back for _, back in backwards if isinstance(back, WeightRenaming)]
        self._aliases = _aliases(model)
        self.fused: dict[str, CheckpointTensor] = {tensor.key: tensor for tensor in self._module_tensors()}
        self.saved: dict[str, CheckpointTensor] = {
            tensor.key: tensor for fused in self.fused.values() for tensor in self._as_saved(fused)
        }

    def find(self, key: str) -> CheckpointTensor | None:
        """What a checkpoint's ``key`` holds: its name may be of either format, one of a tied parameter, or lack the
        base model's prefix."""
        if key in self.saved:
            return self.saved[key]
        renamed = self.module_name(key)
        prefix = f"{self._model.module.base_model_prefix}."
        for name in (key, renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix)):
            found = self.saved.get(name) or self.fused.get(self._aliases.get(name, name))
            if found is not None:
                return found
        return None

    def module_name(self, key: str) -> str:
        """``key`` as the module would name it, as far as plain renaming goes."""
        return apply_renamings(key, self._renamings)

    def _module_tensors(self) -> Iterator[CheckpointTensor]:
        model = self._model
        experts = {
            name: (layer, expert, tensor)
            for layer, parts in model.moe_parts.items()
            for name, (expert, tensor) in expert_names(parts).items()
        }
        dense = {t.name: key for key, layout in model.layouts.items() if not key.is_expert for t in layout.tensors}
        for name, parameter in model.module.named_parameters():
            if name in experts:
                layer, expert, tensor = experts[name]
                numbers = range(parameter.shape[0]) if expert is None else (expert,)
                units = [UnitKey(layer, number) for number in numbers]
            else:
                tensor, units = name, [dense[name]]
            spec = next(t for t in model.layouts[units[0]].tensors if t.name == tensor)
            yield CheckpointTensor(
                key=name,
                shape=tuple(parameter.shape),
                dtype=torch_dtype(model.layouts[units[0]].dtype),
                pieces=tuple(_whole(unit, spec) for unit in units),
            )
        for name, buffer in persistent_buffers(model).items():
            piece = _whole(None, TensorSpec(name=name, shape=tuple(buffer.shape)))
            yield CheckpointTensor(key=name, shape=tuple(buffer.shape), dtype=buffer.dtype, pieces=(piece,))

    def _as_saved(self, fused: CheckpointTensor) -> Iterator[CheckpointTensor]:
        for converter, back in self._converters:
            renamed, matched = back.rename_source_key(fused.key)
            if matched is None:
                continue
            _require_stacked_experts(converter, self._model, fused)
            # ``renamed`` has the first source pattern in the target's place; the other sources go there likewise.
            sources = back.target_patterns
            for piece in fused.pieces:
                num_rows = piece.num_rows // len(sources)
                for part, source in enumerate(sources):
                    name = renamed.replace(sources[0], source).replace("*", str(piece.unit.expert if piece.unit else 0))
                    yield CheckpointTensor(
                        key=apply_renamings(name, self._to_saved),
                        shape=(num_rows, *fused.shape[2:]),
                        dtype=fused.dtype,
                        pieces=(
                            Piece(unit=piece.unit, tensor=piece.tensor, first_row=part * num_rows, num_rows=num_rows),
                        ),
                    )
            return
        yield CheckpointTensor(
            key=apply_renamings(fused.key, self._to_saved), shape=fused.shape, dtype=fused.dtype, pieces=fused.pieces
        )


def persistent_buffers(model: MoeModel) -> dict[str, torch.Tensor]:
    """Buffers that belong in a checkpoint (DeepSeek-V3's ``e_score_correction_bias``), by module name."""
    names = model.module.state_dict().keys()
    return {name: buffer for name, buffer in model.module.named_buffers() if name in names}


def _whole(unit: UnitKey | None, spec: TensorSpec) -> Piece:
    return Piece(unit=unit, tensor=spec.name, first_row=0, num_rows=spec.shape[0] if spec.shape else 1)


def _require_stacked_experts(converter: WeightConverter, model: MoeModel, fused: CheckpointTensor) -> None:
    """Raises ``ValueError`` unless the fused tensor is its sources stacked by expert and, if several, concatenated."""
    operations = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    num_sources = len(converter.source_patterns)
    wanted = [(MergeModulelist, 0)] if num_sources == 1 else [(MergeModulelist, 0), (Concatenate, 1)]
    is_experts = all(piece.unit is not None and piece.unit.is_expert for piece in fused.pieces)
    if operations != wanted or not is_experts or len(converter.target_patterns) != 1:
        raise ValueError(
            f"model: {model.spec.model_type!r} stores {fused.key} as {', '.join(converter.source_patterns)} joined by "
            f"{converter.operations}; wanted experts that are stacked, or stacked and concatenated"
        )


def _aliases(model: MoeModel) -> dict[str, str]:
    """Every other name of a tied parameter -> its first name."""
    first: dict[torch.nn.Parameter, str] = {}
    aliases = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            aliases[name] = first[parameter]
    return aliases
