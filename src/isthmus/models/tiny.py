"""Small random checkpoints: tiny ones of every tested family for tests and the demo, and any size for benchmarks.

Weights have real spread (fan-in scaling, biases and norms that are not constant), so that the routing is not trivial.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NllbMoeConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)

from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.models.writer import write_checkpoint
from isthmus.spec.model import UnitKey

EMBEDDING_STD = 0.3
SMALL_STD = 0.1

_DECODER: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.02,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_DEEPSEEK: dict[str, Any] = _DECODER | dict(
    num_hidden_layers=3,
    num_key_value_heads=4,
    first_k_dense_replace=1,
    n_shared_experts=1,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=24,
)
_ENCODER_DECODER: dict[str, Any] = dict(
    vocab_size=128, d_model=32, num_experts=4, expert_capacity=64, router_aux_loss_coef=0.02
)

_QWEN2 = dict(
    num_experts=8,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    intermediate_size=48,
    mlp_only_layers=[0],
)
# The default rotary scaling wants the default number of positions.
_GPT_OSS = dict(num_local_experts=4, intermediate_size=48, head_dim=8, sliding_window=8, max_position_embeddings=131072)
_SWITCH = dict(
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    num_heads=4,
    dropout_rate=0.0,
    router_jitter_noise=0.0,
    decoder_start_token_id=0,  # the class itself has no default
)
_NLLB = dict(
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    moe_token_dropout=0.0,
    max_position_embeddings=128,
)

_TINY: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, _DECODER | dict(num_local_experts=4, intermediate_size=48)),
    "qwen2_moe": (Qwen2MoeConfig, _DECODER | _QWEN2 | dict(num_hidden_layers=3)),
    "qwen3_moe": (
        Qwen3MoeConfig,
        _DECODER | dict(num_experts=8, moe_intermediate_size=24, intermediate_size=48, head_dim=8),
    ),
    "olmoe": (OlmoeConfig, _DECODER | dict(num_experts=8, intermediate_size=24)),
    "deepseek_v2": (DeepseekV2Config, _DEEPSEEK | dict(topk_method="group_limited_greedy", routed_scaling_factor=1.5)),
    "deepseek_v3": (DeepseekV3Config, _DEEPSEEK),
    "gpt_oss": (GptOssConfig, _DECODER | _GPT_OSS),
    "switch_transformers": (SwitchTransformersConfig, _ENCODER_DECODER | _SWITCH),
    "nllb-moe": (NllbMoeConfig, _ENCODER_DECODER | _NLLB),
}

FAMILIES = tuple(_TINY)
"""The ``model_type`` of every tested family."""


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A configuration of ``family`` (one of ``FAMILIES``) with hidden size 32, 2 to 4 layers, 4 to 8 experts and no
    dropout.

    ``overrides`` are fields of the family's own configuration class. Raises ``ValueError`` for an unknown family.
    """
    if family not in _TINY:
        raise ValueError(f"family: got {family!r}, wanted one of {', '.join(FAMILIES)}")
    config_class, fields = _TINY[family]
    # Lists (mlp_only_layers) are the configuration's own from here on.
    fresh: dict[str, Any] = {name: list(value) if isinstance(value, list) else value for name, value in fields.items()}
    return config_class(**(fresh | overrides))


def write_tiny_checkpoint(family: str, path: Path, seed: int, dtype: str, **overrides: Any) -> PretrainedConfig:
    """A checkpoint of ``tiny_config(family, **overrides)``, written by transformers' own ``save_pretrained``.

    ``dtype`` is ``fp32`` or ``bf16``. Returns the configuration.
    """
    config = tiny_config(family, **overrides)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    module = auto_class.from_config(config, dtype=torch_dtype(dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            random = _initializer(name, module.config)
            parameter.copy_(random(tuple(parameter.shape), generator))
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # from_config makes it bf16 in a bf16 model, from_pretrained keeps it in FP32.
                buffer.data = torch.randn(buffer.shape, generator=generator) * SMALL_STD
    module.save_pretrained(path)
    return config


def write_random_checkpoint(
    config: PretrainedConfig,
    path: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "fp32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A checkpoint of any supported ``config`` in the new or empty directory ``path``, unit by unit: it may be
    larger than memory.

    ``dtype`` is ``fp32`` or ``bf16``; the same seed gives the same weights. ``tokenizer`` is saved along.
    """
    path.mkdir(parents=True, exist_ok=True)
    model = MoeModel.build(config, dtype)

    def random_unit(key: UnitKey) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(hash((seed, key.layer, key.expert)) % 2**63)
        return {
            tensor.name: _initializer(tensor.name, model.module.config)(tensor.shape, generator)
            for tensor in model.layouts[key].tensors
        }

    write_checkpoint(path, model, random_unit, dtype=dtype, max_shard_bytes=max_shard_bytes, tokenizer_from=None)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


_Initializer = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def _initializer(name: str, config: PretrainedConfig) -> _Initializer:
    """How a parameter of this name is drawn: embeddings, norms around 1, small biases, and fan-in scaled matrices."""
    # gpt-oss stores its experts as (…, in, out), everything else is (…, out, in).
    fan_in_dimension = (
        -2 if config.model_type == "gpt_oss" and name.rpartition(".")[2] in ("gate_up_proj", "down_proj") else -1
    )
    is_embedding = "embed" in name or name.removeprefix("model.") == "shared.weight"
    is_bias = "bias" in name.rpartition(".")[2] or name.endswith("sinks")

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if is_embedding:
            return values * EMBEDDING_STD
        if is_bias:
            return values * SMALL_STD
        if len(shape) == 1:
            return 1 + values * SMALL_STD
        return values * shape[fan_in_dimension] ** -0.5

    return draw
