"""A model's blueprint from its configuration alone: no weight is read, none has memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from isthmus.models.config import load_config
from isthmus.models.moe_model import MoeModel
from isthmus.planning.memory import Blueprint
from isthmus.profiling.activations import count_saved_bytes
from isthmus.tuning.data import IGNORED, keep_documents_apart


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
    ids = torch.zeros((micro_batch_size, seq_len), dtype=torch.int64)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    if config.is_encoder_decoder:
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    half = seq_len // 2
    positions = torch.cat([torch.arange(half), torch.arange(seq_len - half)])
    return {"input_ids": ids, "labels": labels, "position_ids": positions.expand(micro_batch_size, seq_len)}
