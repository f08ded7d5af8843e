"""A decoupled layer computes what its definition says, one sub-block at a time, and nothing passes between slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.decoupled.conftest import DECODERS, HIDDEN, tiny, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from isthmus.models.decoupled.architectures import layers_of
from isthmus.models.decoupled.configs import decoupled_config

FORMS: dict[str, dict[str, Any]] = {
    "even": {"num_sub_blocks": 4},
    "uneven": {"num_sub_blocks": 3, "sub_block_widths": [8, 8, 16]},
    "own heads": {"num_sub_blocks": 2, "sub_block_heads": "own"},
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FORMS[request.param]


def model_of(family: str, form: dict[str, Any], originals: tuple[int, ...] = (1,)) -> PreTrainedModel:
    torch.manual_seed(0)
    config = decoupled_config(tiny(family), {**form, "original_layers": list(originals)})
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def called(model: PreTrainedModel, layer: nn.Module, **inputs: Tensor) -> dict[str, Any]:
    """How the model calls ``layer``: positional arguments, named ones, and what it returned."""
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    options = {"use_cache": False} if model.config.model_type.removeprefix("decoupled_") in DECODERS else {}
    with torch.no_grad():
        model(**inputs, **options)
    handle.remove()
    return seen


class Reference:
    """The definition, sub-block after sub-block (DeTransformer, section III), with plain matrix products."""

    def __init__(self, model: PreTrainedModel, layer: Any) -> None:
        self.config: Any = model.config
        self.layer = layer
        self.is_own = self.config.decoupling.heads == "own"

    def reading(self, weight_OH: Tensor, bias: Tensor | None, number: int, units: slice) -> tuple[Tensor, Any]:
        if self.is_own:
            num = len(self.config.decoupling.widths)
            rows = slice(number * len(weight_OH) // num, (number + 1) * len(weight_OH) // num)
            return weight_OH[rows], None if bias is None else bias[rows]
        return weight_OH[:, units], bias

    def norm(self, x: Tensor, norm: Any, units: slice) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, x.shape[-1:], norm.weight[units], norm.bias[units], norm.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight[units]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, head_size: int, rotate: Any, mask: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, head_size)).transpose(1, 2)

        query, key, value = heads(q), heads(k), heads(v)
        own = getattr(self.layer, "self_attn", None)
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)  # type: ignore[union-attr]
        if rotate is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotate)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT / head_size**0.5
        return (scores.masked_fill(~mask, -1e9).softmax(-1) @ value).transpose(1, 2).flatten(2)

    def __call__(self, hidden: Tensor, mask: Tensor, rotate: Any = None) -> Tensor:
        outputs, start = [], 0
        for number, width in enumerate(self.config.decoupling.widths):
            units = slice(start, start + width)
            outputs.append(self.sub_block(hidden[..., units], number, units, mask, rotate))
            start += width
        return torch.cat(outputs, dim=-1)

    def sub_block(self, x: Tensor, number: int, units: slice, mask: Tensor, rotate: Any) -> Tensor:
        layer = self.layer
        if hasattr(layer, "attention"):
            own = layer.attention.self
            q, k, v = (
                F.linear(x, *self.reading(m.weight, m.bias, number, units)) for m in (own.query, own.key, own.value)
            )
            mixed = self.attention(q, k, v, own.attention_head_size, None, mask)
            out = layer.attention.output
            x = self.norm(x + F.linear(mixed, out.dense.weight[units], out.dense.bias[units]), out.LayerNorm, units)
            up, down = layer.intermediate.dense, layer.output
            inner = F.gelu(F.linear(x, up.weight[:, units], up.bias))
            return self.norm(
                x + F.linear(inner, down.dense.weight[units], down.dense.bias[units]), down.LayerNorm, units
            )
        if hasattr(layer, "attn"):
            own, mlp = layer.attn, layer.mlp
            normed = self.norm(x, layer.ln_1, units)
            q, k, v = (
                F.linear(normed, *self.reading(weight, bias, number, units))
                for weight, bias in zip(own.c_attn.weight.t().chunk(3), own.c_attn.bias.chunk(3), strict=True)
            )
            mixed = self.attention(q, k, v, own.head_dim, None, mask)
            x = x + F.linear(mixed, own.c_proj.weight.t()[units], own.c_proj.bias[units])
            inner = mlp.act(F.linear(self.norm(x, layer.ln_2, units), mlp.c_fc.weight.t()[:, units], mlp.c_fc.bias))
            return x + F.linear(inner, mlp.c_proj.weight.t()[units], mlp.c_proj.bias[units])
        own, mlp = layer.self_attn, layer.mlp
        normed = self.norm(x, layer.input_layernorm, units)
        q, k, v = (
            F.linear(normed, *self.reading(m.weight, m.bias, number, units))
            for m in (own.q_proj, own.k_proj, own.v_proj)
        )
        x = x + F.linear(self.attention(q, k, v, own.head_dim, rotate, mask), own.o_proj.weight[units])
        normed = self.norm(x, layer.post_attention_layernorm, units)
        gate = F.silu(F.linear(normed, mlp.gate_proj.weight[:, units]))
        return x + F.linear(gate * F.linear(normed, mlp.up_proj.weight[:, units]), mlp.down_proj.weight[units])


def mask_of(attention_mask: Tensor, is_causal: bool) -> Tensor:
    """Which query may see which key, (B, 1, T, T)."""
    mask = attention_mask.bool()[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
    return mask & torch.ones_like(mask).tril() if is_causal else mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layer_is_its_definition(family: str, form: dict[str, Any], implementation: str) -> None:
    model = model_of(family, form)
    model.set_attn_implementation(implementation)
    layer: Any = layers_of(model)[0]
    input_ids = tokens()
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    seen = called(model, layer, input_ids=input_ids, attention_mask=attention_mask)
    hidden = seen["args"][0] if seen["args"] else seen["kwargs"]["hidden_states"]
    mask = mask_of(attention_mask, family in DECODERS)
    with torch.no_grad():
        wanted = Reference(model, layer)(hidden, mask, seen["kwargs"].get("position_embeddings"))
    is_token = attention_mask.bool()
    torch.testing.assert_close(seen["output"][is_token], wanted[is_token], rtol=1e-5, atol=1e-5)


def test_a_slice_sees_nothing_of_the_others(family: str, form: dict[str, Any]) -> None:
    model = model_of(family, form)
    decoupled, original = layers_of(model)[:2]
    seen = called(model, decoupled, input_ids=tokens())
    kwargs = dict(seen["kwargs"])
    hidden = seen["args"][0] if seen["args"] else kwargs.pop("hidden_states")
    rest = seen["args"][1:]
    start = 0
    for width in model.config.decoupling.widths:
        disturbed = hidden.clone()
        disturbed[:, 2, start : start + width] += 1.0
        with torch.no_grad():
            change = decoupled(disturbed, *rest, **kwargs) - decoupled(hidden, *rest, **kwargs)
            mixed = original(disturbed, *rest, **kwargs) - original(hidden, *rest, **kwargs)
        own = change[..., start : start + width].abs().max()
        assert own > 1e-3
        change[..., start : start + width] = 0
        assert change.abs().max() == 0
        assert (mixed.abs().amax(dim=(0, 1)) > 0).all()
        start += width
    assert start == HIDDEN


def test_published_form_has_the_originals_parameters_shape_by_shape(family: str) -> None:
    original = AutoModel.from_config(tiny(family)).state_dict()
    for form in (FORMS["even"], FORMS["uneven"]):
        decoupled = model_of(family, form).state_dict()
        assert {name: tensor.shape for name, tensor in decoupled.items()} == {
            name: tensor.shape for name, tensor in original.items()
        }


def test_heads_of_their_own_take_fewer_parameters_and_a_smaller_cache(family: str) -> None:
    every, own = (model_of(family, {"num_sub_blocks": 2, "sub_block_heads": heads}) for heads in ("all", "own"))
    assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in every.parameters())
    if family in DECODERS:
        sizes = []
        for model in (AutoModel.from_config(tiny(family)), own, every):
            cache = model(tokens(), use_cache=True).past_key_values
            sizes.append(cache.layers[0].keys.numel())
        assert sizes[1] == sizes[0] and sizes[2] == 2 * sizes[0]


def test_several_texts_at_once_are_each_by_itself(family: str, form: dict[str, Any]) -> None:
    model = model_of(family, form)
    input_ids = tokens()
    with torch.no_grad():
        together = model(input_ids).last_hidden_state
        for row in range(len(input_ids)):
            alone = model(input_ids[row : row + 1]).last_hidden_state
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
