"""Mixture-of-Experts models that are known by name: those of APTMoE's evaluation."""

from __future__ import annotations

from isthmus.spec.model import ExpertSpec, ModelSpec, TensorSpec

NUM_LAYERS = 64
TOP_K = 2
_SIZES = {"S": (1024, 4096), "M": (2048, 8192), "L": (4096, 14336)}


def _shape(size: str, num_experts: int) -> ModelSpec:
    """Attention's four square matrices and a router in every layer, experts of two matrices with ReLU, no embeddings:
    what the published parameter numbers leave room for."""
    hidden, inner = _SIZES[size]
    tensors = (TensorSpec(name="up_proj", shape=(inner, hidden)), TensorSpec(name="down_proj", shape=(hidden, inner)))
    expert = ExpertSpec(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=num_experts,
        top_k=TOP_K,
        has_gate=False,
        has_bias=False,
        is_transposed=False,
        activation="relu",
        tensors=tensors,
    )
    return ModelSpec(
        model_type="published",
        architecture=f"{size}-{num_experts}",
        is_encoder_decoder=False,
        num_layers=NUM_LAYERS,
        hidden_size=hidden,
        vocab_size=1,
        layers=(expert,) * NUM_LAYERS,
        dense_numel=(4 * hidden * hidden + hidden * num_experts,) * NUM_LAYERS,
        outer_numel=0,
    )


MOE_SHAPES: dict[str, ModelSpec] = {
    f"{size}-{num}": _shape(size, num) for size, num in (("S", 8), ("S", 16), ("S", 64), ("M", 8), ("M", 16), ("L", 8))
}
