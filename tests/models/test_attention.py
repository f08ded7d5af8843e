"""Attention by blocks: what the plain formula gives, values and gradients, whatever the mask, sizes and path."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig

from isthmus.models import attention
from isthmus.models.attention import BLOCK_QUERIES, NAME, attention_forward, use_blocked_attention
from isthmus.models.skeleton import build_skeleton

Q = 2 * BLOCK_QUERIES + 13
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def tensors(
    dtype: torch.dtype = torch.float32, num_keys: int = Q
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (2, 6, Q, 16), key (2, 3, K, 16), value (2, 3, K, 24), gradient (2, Q, 6, 24)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, Q, 16), (2, 3, num_keys, 16), (2, 3, num_keys, 24), (2, Q, 6, 24)
    query, key, value, gradient = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value, gradient


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(query · keyᵀ · scale) · value in FP64, keys and values repeated; (B, Q, H, V)."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def causal_mask() -> torch.Tensor:
    return torch.ones(1, 1, Q, Q, dtype=torch.bool).tril()


def packed_mask() -> torch.Tensor:
    """Documents that begin anywhere, others in each sequence."""
    document_BQ = torch.zeros(2, Q, dtype=torch.long)
    for sequence, starts in enumerate(((20, 21, 90), (BLOCK_QUERIES,))):
        document_BQ[sequence, list(starts)] = 1
    document_BQ = document_BQ.cumsum(dim=1)
    return causal_mask() & (document_BQ[:, None, :, None] == document_BQ[:, None, None, :])


def window_mask() -> torch.Tensor:
    return causal_mask() & ~causal_mask().tril(-9)


CASES = {
    "causal": (None, True, causal_mask()),
    "everything": (None, False, torch.ones(1, 1, Q, Q, dtype=torch.bool)),
    "packed": (packed_mask(), None, packed_mask()),
    "window": (window_mask(), None, window_mask()),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(
    case: str, keeps: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEEP_UP_TO_KEYS", 10_000 if keeps else 0)
    mask, is_causal, full_mask = CASES[case]
    *inputs, gradient = tensors(dtype)
    query, key, value = ours = [tensor.clone().requires_grad_() for tensor in inputs]
    out, nothing = attention_forward(nn.Module(), query, key, value, mask, scaling=0.3, is_causal=is_causal)
    query, key, value = theirs = [tensor.double().requires_grad_() for tensor in inputs]
    expected = plain(query, key, value, full_mask, 0.3)
    out.backward(gradient)
    expected.backward(gradient.double())
    assert nothing is None and out.dtype == dtype
    wanted = [expected, *(tensor.grad for tensor in theirs)]
    for got, want in zip([out, *(tensor.grad for tensor in ours)], wanted, strict=True):
        assert got is not None and want is not None
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_more_keys_than_queries_under_a_mask() -> None:
    query, key, value, _ = tensors(num_keys=Q + 50)
    mask = torch.ones(2, 1, Q, Q + 50, dtype=torch.bool).tril(50)
    out, _ = attention_forward(nn.Module(), query, key, value, mask)
    expected = plain(query.double(), key.double(), value.double(), mask, 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_a_query_that_sees_nothing_gets_something_finite() -> None:
    *inputs, gradient = tensors()
    query, key, value = inputs = [tensor.requires_grad_() for tensor in inputs]
    mask = causal_mask().expand(2, -1, -1, -1).clone()
    mask[1, :, :BLOCK_QUERIES] = False
    mask[0, :, 3] = False
    out, _ = attention_forward(nn.Module(), query, key, value, mask)
    out.backward(gradient)
    for tensor in (out, *(tensor.grad for tensor in inputs)):
        assert tensor is not None and tensor.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": None, "dropout": 0.5},
        {"attention_mask": torch.zeros(1, 1, Q, Q)},
        {"attention_mask": None, "position_bias": torch.zeros(1, 6, Q, Q)},
        {"attention_mask": torch.ones(1, 6, Q, Q, dtype=torch.bool)},
    ],
    ids=["dropout", "additive mask", "position bias", "mask per head"],
)
def test_what_it_does_not_know_goes_to_pytorch(arguments: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: seen.append(args))
    query, key, value, _ = tensors()
    attention_forward(nn.Module(), query, key, value, **arguments)
    assert len(seen) == 1


def tiny_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
    )


def test_only_models_with_the_fused_attention_change_theirs() -> None:
    model = build_skeleton(tiny_config(), "fp32")
    use_blocked_attention(model)
    assert model.config._attn_implementation == NAME
    config = tiny_config()
    config._attn_implementation = "eager"
    model = build_skeleton(config, "fp32")
    use_blocked_attention(model)
    assert model.config._attn_implementation == "eager"


def test_queries_and_keys_in_another_precision_are_computed_in_that_of_the_values() -> None:
    query, key, value, _ = tensors(torch.float32)
    mixed, _ = attention_forward(nn.Identity(), query, key, value.bfloat16(), None, is_causal=True)
    same, _ = attention_forward(nn.Identity(), query.bfloat16(), key.bfloat16(), value.bfloat16(), None, is_causal=True)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, same)
