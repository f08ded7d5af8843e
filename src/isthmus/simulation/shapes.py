"""Models that are known by name, as far as a plan needs them, and how they are decoupled."""

from __future__ import annotations

from isthmus.spec.decoupling import original_layers_of
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferenceRequest
from isthmus.spec.transformer import TransformerSpec


def _shape(
    model_type: str, num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, most: int
) -> TransformerSpec:
    is_decoder = model_type == "gpt2"
    return TransformerSpec(
        model_type=model_type,
        is_decoder=is_decoder,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_num_tokens=most,
        activation="gelu_new" if is_decoder else "gelu",
        has_gate=False,
        norm="layer",
        norm_epsilon=1e-5 if is_decoder else 1e-12,
        norm_first=is_decoder,
        has_rotary=False,
        num_token_types=0 if is_decoder else 2,
    )


SHAPES: dict[str, TransformerSpec] = {
    "bert-base": _shape("bert", 12, 768, 12, 30522, 512),
    "bert-large": _shape("bert", 24, 1024, 16, 30522, 512),
    "gpt2": _shape("gpt2", 12, 768, 12, 50257, 1024),
    "gpt2-medium": _shape("gpt2", 24, 1024, 16, 50257, 1024),
}


def decoupled(spec: TransformerSpec, num_sub_blocks: int, num_groups: int, heads: str = "all") -> TransformerSpec:
    """``spec`` with the last layer of each group left original. Raises ``IsthmusError`` for what does not fit."""
    if spec.decoupling is not None:
        raise IsthmusError("sub_blocks: the model is decoupled already; leave --sub-blocks out")
    return spec.decoupled(num_sub_blocks, original_layers_of(spec.num_layers, num_groups), heads=heads)


def check_request(spec: TransformerSpec, request: InferenceRequest) -> None:
    """Raises ``IsthmusError`` for what cannot be asked of the model."""
    most = spec.max_num_tokens
    if request.num_tokens > most:
        raise IsthmusError(f"tokens: got {request.num_tokens}, wanted at most the {most} it allows")
    if request.num_new_tokens and not spec.is_decoder:
        raise IsthmusError(f"new_tokens: got {request.num_new_tokens} for {spec.model_type!r}, an encoder; wanted 0")
    if request.num_tokens + request.num_new_tokens > most:
        raise IsthmusError(
            f"new_tokens: got {request.num_new_tokens} after {request.num_tokens} tokens, wanted at most "
            f"{most - request.num_tokens}: the model allows {most} in all"
        )
