"""A model's blueprint from its configuration alone: no weight is read, none has memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from isthmus.models.config import load_config
from isthmus.models.moe_model import MoeModel
from isthmus.planning.memory import Blueprint
from isthmus.profiling.activations import count_saved_bytes
from isthmus.tuning.data import keep_documents_apart
from isthmus.tuning.data.batches import largest_micro_batch


def read_blueprint(
    model: str | Path, *, dtype: str, seq_len: int, micro_batch_size: int, num_layers: int | None = None
) -> Blueprint:
    """Of ``model``, a directory with a ``config.json`` or a Hugging Face id, for micro-batches of packed documents.
    Blocks for seconds. Raises ``ValueError`` or ``OSError`` as ``load_config`` does."""
    config = load_config(model, num_layers=num_layers)
    return blueprint_of(config, dtype, packed_inputs(config, micro_batch_size, seq_len))


def blueprint_of(config: PretrainedConfig, dtype: str, inputs: dict[str, Tensor]) -> Blueprint:
    """For micro-batches like ``inputs``, whose numbers do not matter but where documents begin."""
    model = MoeModel.build(config, dtype)
    model.module.train()
    keep_documents_apart(model.module)
    saved = count_saved_bytes(model, inputs)
    num_tokens = inputs["input_ids"].numel() * (2 if model.spec.is_encoder_decoder else 1)
    return Blueprint(spec=model.spec, dtype=dtype, layouts=model.layouts, saved=saved, num_tokens=num_tokens)


def packed_inputs(config: PretrainedConfig, micro_batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """A micro-batch as training data makes them: two documents in every sequence, for which attention needs a mask.
    With an encoder, sources and targets of the full length."""
    return largest_micro_batch(micro_batch_size, seq_len, seq_len if config.is_encoder_decoder else None).inputs
