"""Tiny configurations of every family that can be decoupled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

HIDDEN = 32
VOCAB = 61
_ENCODER: dict[str, Any] = dict(
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=VOCAB,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_DECODER: dict[str, Any] = dict(
    hidden_size=HIDDEN,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=VOCAB,
    max_position_embeddings=40,
    pad_token_id=0,
)
_GPT2: dict[str, Any] = dict(n_embd=HIDDEN, n_layer=3, n_head=4, n_inner=48, vocab_size=VOCAB, n_positions=40)
_NO_DROPOUT: dict[str, Any] = dict(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
TINY: dict[str, Any] = {
    "bert": lambda: BertConfig(**_ENCODER),
    "roberta": lambda: RobertaConfig(**_ENCODER),
    "gpt2": lambda: GPT2Config(**_GPT2, **_NO_DROPOUT),
    "llama": lambda: LlamaConfig(**_DECODER),
    "mistral": lambda: MistralConfig(**_DECODER, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen3": lambda: Qwen3Config(**_DECODER, head_dim=8),
}
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny(family: str) -> PretrainedConfig:
    return TINY[family]()


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
