"""Families of plain Transformers: what their configuration says, and under which names their weights are stored.

A layer's tensors have uniform names here: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down`` (each ``.weight``,
(out, in) whatever the checkpoint's order, and ``.bias`` where there is one), ``q_norm.weight``, ``k_norm.weight`` and
the norms ``norm1`` and ``norm2`` of attention and MLP (``.weight``, ``.bias``). Outside of layers: ``token.weight``,
``position.weight``, ``type.weight`` (tables), ``embedding_norm``, ``final_norm``, ``head.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from isthmus.spec.errors import IsthmusError
from isthmus.spec.transformer import TransformerSpec

MATRICES = frozenset(("q", "k", "v", "o", "gate", "up", "down"))


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a uniform tensor lies: ``key`` in the checkpoint, stored (in, out) if ``is_transposed``; it is part
    ``part`` of ``num_parts`` equal parts along its outputs (GPT-2 keeps q, k and v in one)."""

    key: str
    is_transposed: bool = False
    part: int = 0
    num_parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family. ``layer`` and ``outer`` map uniform names, without ``.weight`` or ``.bias``, to stored ones; those of
    a layer have ``{}`` for its number."""

    spec: Callable[[Any], TransformerSpec]
    layer: dict[str, str]
    outer: dict[str, str]
    prefixes: tuple[str, ...]
    """What may stand before every name but the head's: a bare model has none, one with a head its body's name."""
    head: str | None = None
    is_transposed: bool = False
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def stored(self, layer: int | None, name: str, prefix: str) -> Stored:
        """Where uniform tensor ``name`` (of ``layer``, or of none) lies in a checkpoint that uses ``prefix``."""
        base, _, kind = name.rpartition(".")
        if layer is None:
            return Stored(key=f"{self.head}.{kind}" if base == "head" else f"{prefix}{self.outer[base]}.{kind}")
        part, num_parts = self.parts.get(base, (0, 1))
        return Stored(
            key=f"{prefix}{self.layer[base].format(layer)}.{kind}",
            is_transposed=self.is_transposed and kind == "weight" and base in MATRICES,
            part=part,
            num_parts=num_parts,
        )

    def prefix_in(self, keys: Collection[str]) -> str:
        """Which of ``prefixes`` a checkpoint with these ``keys`` uses. Raises ``IsthmusError`` for none."""
        token = self.outer["token"]
        for prefix in self.prefixes:
            if f"{prefix}{token}.weight" in keys:
                return prefix
        wanted = " or ".join(f"{prefix}{token}.weight" for prefix in self.prefixes)
        raise IsthmusError(f"checkpoint: has no {wanted}; it does not fit its config.json")


def _bert_spec(config: Any) -> TransformerSpec:
    _refuse(config, "position_embedding_type", ("absolute", None))
    return TransformerSpec(
        model_type=config.model_type,
        is_decoder=False,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_num_tokens=config.max_position_embeddings,
        activation=config.hidden_act,
        has_gate=False,
        norm="layer",
        norm_epsilon=config.layer_norm_eps,
        norm_first=False,
        has_rotary=False,
        num_token_types=config.type_vocab_size,
    )


def _roberta_spec(config: Any) -> TransformerSpec:
    offset = config.pad_token_id + 1
    values = vars(_bert_spec(config))
    return TransformerSpec(
        **values | {"position_offset": offset, "max_num_tokens": config.max_position_embeddings - offset}
    )


def _distilbert_spec(config: Any) -> TransformerSpec:
    return TransformerSpec(
        model_type=config.model_type,
        is_decoder=False,
        num_layers=config.n_layers,
        hidden_size=config.dim,
        num_heads=config.n_heads,
        num_kv_heads=config.n_heads,
        head_size=config.dim // config.n_heads,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        max_num_tokens=config.max_position_embeddings,
        activation=config.activation,
        has_gate=False,
        norm="layer",
        norm_epsilon=1e-12,
        norm_first=False,
        has_rotary=False,
    )


def _gpt2_spec(config: Any) -> TransformerSpec:
    for name, wanted in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("reorder_and_upcast_attn", False),
        ("add_cross_attention", False),
    ):
        _refuse(config, name, (wanted,))
    return TransformerSpec(
        model_type=config.model_type,
        is_decoder=True,
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        vocab_size=config.vocab_size,
        max_num_tokens=config.n_positions,
        activation=config.activation_function,
        has_gate=False,
        norm="layer",
        norm_epsilon=config.layer_norm_epsilon,
        norm_first=True,
        has_rotary=False,
        is_head_tied=config.tie_word_embeddings,
    )


def _llama_spec(config: Any) -> TransformerSpec:
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if types != {"full_attention"} else None
    if window is not None and not getattr(config, "use_sliding_window", True):
        window = None
    if len(types) > 1:
        raise IsthmusError(
            f"model: {config.model_type!r} mixes {', '.join(sorted(types))} layers; wanted layers of one kind "
            "(set use_sliding_window to false in config.json if its inputs are shorter than the window)"
        )
    return TransformerSpec(
        model_type=config.model_type,
        is_decoder=True,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_num_tokens=config.max_position_embeddings,
        activation=config.hidden_act,
        has_gate=True,
        norm="rms",
        norm_epsilon=config.rms_norm_eps,
        norm_first=True,
        has_rotary=True,
        has_qk_norm=config.model_type.endswith("qwen3"),
        sliding_window=window,
        is_head_tied=config.tie_word_embeddings,
    )


def _refuse(config: PretrainedConfig, name: str, known: tuple[object, ...]) -> None:
    value = getattr(config, name, known[0])
    if value not in known:
        raise IsthmusError(f"model: {name} is {value!r} in config.json, and only {known[0]!r} is supported")


_BERT_LAYER = "encoder.layer.{}."
_BERT_NAMES = {
    "q": _BERT_LAYER + "attention.self.query",
    "k": _BERT_LAYER + "attention.self.key",
    "v": _BERT_LAYER + "attention.self.value",
    "o": _BERT_LAYER + "attention.output.dense",
    "norm1": _BERT_LAYER + "attention.output.LayerNorm",
    "up": _BERT_LAYER + "intermediate.dense",
    "down": _BERT_LAYER + "output.dense",
    "norm2": _BERT_LAYER + "output.LayerNorm",
}
_DISTILBERT_OUTER = {
    "token": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
_BERT_OUTER = _DISTILBERT_OUTER | {"type": "embeddings.token_type_embeddings"}
_LLAMA_LAYER = "layers.{}."
_LLAMA = Family(
    spec=_llama_spec,
    prefixes=("model.", ""),
    layer={
        **{name: f"{_LLAMA_LAYER}self_attn.{name}_proj" for name in "qkvo"},
        **{name: f"{_LLAMA_LAYER}self_attn.{name}" for name in ("q_norm", "k_norm")},
        **{name: f"{_LLAMA_LAYER}mlp.{name}_proj" for name in ("gate", "up", "down")},
        "norm1": _LLAMA_LAYER + "input_layernorm",
        "norm2": _LLAMA_LAYER + "post_attention_layernorm",
    },
    outer={"token": "embed_tokens", "final_norm": "norm"},
    head="lm_head",
)
FAMILIES: dict[str, Family] = {
    "bert": Family(spec=_bert_spec, prefixes=("", "bert."), layer=_BERT_NAMES, outer=_BERT_OUTER),
    "roberta": Family(spec=_roberta_spec, prefixes=("", "roberta."), layer=_BERT_NAMES, outer=_BERT_OUTER),
    "distilbert": Family(
        spec=_distilbert_spec,
        prefixes=("", "distilbert."),
        layer={
            "q": "transformer.layer.{}.attention.q_lin",
            "k": "transformer.layer.{}.attention.k_lin",
            "v": "transformer.layer.{}.attention.v_lin",
            "o": "transformer.layer.{}.attention.out_lin",
            "norm1": "transformer.layer.{}.sa_layer_norm",
            "up": "transformer.layer.{}.ffn.lin1",
            "down": "transformer.layer.{}.ffn.lin2",
            "norm2": "transformer.layer.{}.output_layer_norm",
        },
        outer=_DISTILBERT_OUTER,
    ),
    "gpt2": Family(
        spec=_gpt2_spec,
        prefixes=("transformer.", ""),
        layer={
            **{name: "h.{}.attn.c_attn" for name in "qkv"},
            "o": "h.{}.attn.c_proj",
            "norm1": "h.{}.ln_1",
            "up": "h.{}.mlp.c_fc",
            "down": "h.{}.mlp.c_proj",
            "norm2": "h.{}.ln_2",
        },
        outer={"token": "wte", "position": "wpe", "final_norm": "ln_f"},
        head="lm_head",
        is_transposed=True,
        parts={"q": (0, 3), "k": (1, 3), "v": (2, 3)},
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration in ``directory``. Raises ``IsthmusError`` for one that transformers does not know, and
    ``FileNotFoundError`` where there is none."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"model: {directory} has no config.json, wanted a Hugging Face checkpoint directory")
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise IsthmusError(f"model: cannot read the configuration in {directory}: {reason}") from error


def read_family(directory: Path) -> tuple[PretrainedConfig, Family, TransformerSpec]:
    """The configuration in ``directory``, the family and what the model is made of.

    Raises ``IsthmusError`` for an architecture that is not supported (the message names those that are), and
    ``FileNotFoundError`` where there is no ``config.json``.
    """
    config = read_config(directory)
    family = FAMILIES.get(getattr(config, "base_model_type", "") or config.model_type)
    if family is None:
        raise IsthmusError(
            f"model: {directory} is a {config.model_type!r}; only {', '.join(FAMILIES)} can be divided among devices"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise IsthmusError(f"model: {directory} is quantised; wanted plain fp32, bf16 or fp16 weights")
    spec = family.spec(config)
    form = getattr(config, "decoupling", None)
    return config, family, spec if form is None else replace(spec, decoupling=form)
