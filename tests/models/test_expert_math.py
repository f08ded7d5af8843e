from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GptOssConfig, MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from isthmus.models import expert_math, expert_math_grouped
from isthmus.models.expert_math import ExpertMath
from isthmus.models.expert_math_grouped import GroupedExpertMath, can_group, gradient_chunk_bytes
from isthmus.models.routing import combine, gather, sort_by_expert
from isthmus.spec.model import ExpertSpec, TensorSpec

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, NUM_TOKENS = 16, 24, 6, 2, 40
EMPTY_EXPERT = 3
KINDS = ("silu_glu", "gelu_glu", "relu_glu", "gpt_oss_glu", "silu", "gelu", "relu", "module_glu", "module")


class PlainExperts(nn.Module):
    """Experts without a gate, as Switch and NLLB-MoE have them, here with fused names."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(NUM_EXPERTS, INTERMEDIATE, HIDDEN))
        self.up_proj_bias = nn.Parameter(torch.empty(NUM_EXPERTS, INTERMEDIATE))
        self.down_proj = nn.Parameter(torch.empty(NUM_EXPERTS, HIDDEN, INTERMEDIATE))
        self.down_proj_bias = nn.Parameter(torch.empty(NUM_EXPERTS, HIDDEN))
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(NUM_EXPERTS):
            token, choice = torch.where(index == expert)
            act = self.act_fn(F.linear(hidden[token], self.up_proj[expert], self.up_proj_bias[expert]))
            y = F.linear(act, self.down_proj[expert], self.down_proj_bias[expert])
            out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
        return out


def make_module(kind: str) -> nn.Module:
    name = kind.removesuffix("_glu")
    if kind == "gpt_oss_glu":
        module: nn.Module = GptOssExperts(
            GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=NUM_EXPERTS)
        )
    elif kind.endswith("_glu"):
        activation = "quick_gelu" if name == "module" else name
        module = MixtralExperts(
            MixtralConfig(
                hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=NUM_EXPERTS, hidden_act=activation
            )
        )
    else:
        module = PlainExperts("gelu_new" if name == "module" else name)
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"  # pyright: ignore
    return module


def make_spec(kind: str, module: nn.Module) -> ExpertSpec:
    names = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    shapes = {name: tuple(parameter.shape[1:]) for name, parameter in module.named_parameters()}
    return ExpertSpec(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        has_gate=kind.endswith("_glu"),
        has_bias="down_proj_bias" in shapes,
        is_transposed=kind == "gpt_oss_glu",
        activation="module" if kind.startswith("module") else kind,
        tensors=tuple(TensorSpec(name=name, shape=shapes[name]) for name in names if name in shapes),
    )


@dataclass
class Case:
    """Experts, inputs (rounded to the dtype), and what autograd makes of transformers' eager experts in FP32."""

    module: nn.Module
    spec: ExpertSpec
    flats: list[Tensor]
    x_TH: Tensor
    index_Tk: Tensor
    s_Tk: Tensor
    g_TH: Tensor
    out: Tensor
    dx: Tensor
    ds: Tensor
    dflats: list[Tensor]


def make_case(kind: str, dtype: torch.dtype = torch.float32, s_dtype: torch.dtype | None = None) -> Case:
    torch.manual_seed(0)
    module = make_module(kind)
    # Wide pre-activations, so that gpt-oss's clamps and both sides of every function are met.
    for parameter in module.parameters():
        parameter.data.normal_(std=1.0).copy_(parameter.data.to(dtype))
    spec = make_spec(kind, module)
    names = [tensor.name for tensor in spec.tensors]
    parameters = dict(module.named_parameters())
    flats = [torch.cat([parameters[name].data[e].reshape(-1) for name in names]).to(dtype) for e in range(NUM_EXPERTS)]
    x_TH = torch.randn(NUM_TOKENS, HIDDEN).to(dtype)
    popularity = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.1])
    popularity[EMPTY_EXPERT] = 0
    index_Tk = popularity.expand(NUM_TOKENS, -1).multinomial(TOP_K)
    s_Tk = torch.rand(NUM_TOKENS, TOP_K).to(s_dtype or dtype)
    s_Tk[5] = 0
    g_TH = torch.randn(NUM_TOKENS, HIDDEN).to(dtype)
    leaf_x, leaf_s = x_TH.float().requires_grad_(), s_Tk.float().requires_grad_()
    out = module(leaf_x, index_Tk, leaf_s)
    out.backward(g_TH.float())
    assert leaf_x.grad is not None and leaf_s.grad is not None
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    dflats = [torch.cat([gradients[name][e].reshape(-1) for name in names]) for e in range(NUM_EXPERTS)]  # pyright: ignore
    return Case(module, spec, flats, x_TH, index_Tk, s_Tk, g_TH, out.detach(), leaf_x.grad, leaf_s.grad, dflats)


def run(
    case: Case, *, save: bool, accumulate: list[bool] | None = None, start: float = math.nan
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(out, dx, ds, gradients), gradients on top of ``start`` (overwritten where not ``accumulate``)."""
    experts = ExpertMath(case.spec, case.module)
    routing = sort_by_expert(case.index_Tk, NUM_EXPERTS)
    weights = [experts.views(flat) for flat in case.flats]
    gradient_flats = [torch.full_like(flat, start) for flat in case.flats]
    gradients = [experts.views(flat) for flat in gradient_flats]
    x_SH, s_S, g_SH = gather(case.x_TH, routing), case.s_Tk.reshape(-1)[routing.order_S], gather(case.g_TH, routing)
    out_SH, saved = experts.forward_many(weights, routing.counts_E, x_SH, s_S, save=save)
    assert (saved is not None) == save
    dx_SH, ds_S = experts.backward_many(
        weights, routing.counts_E, x_SH, s_S, g_SH, saved, gradients, accumulate=accumulate or [False] * NUM_EXPERTS
    )
    ds = torch.zeros_like(case.s_Tk).reshape(-1)
    ds[routing.order_S] = ds_S
    back = [combine(rows, routing, NUM_TOKENS, TOP_K) for rows in (out_SH, dx_SH)]
    return back[0], back[1], ds.view_as(case.s_Tk), gradient_flats


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Elementwise relative to the size of the tensor: sums cancel, and their rounding is that of their terms."""
    assert not got.isnan().any()
    scale = wanted.abs().amax().item() + 1e-30
    torch.testing.assert_close(got.float() / scale, wanted.float() / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_forward_and_gradients_equal_eager_autograd(kind: str, save: bool) -> None:
    case = make_case(kind)
    out, dx, ds, gradients = run(case, save=save)
    assert_near(out, case.out, 1e-5)
    assert_near(dx, case.dx, 1e-5)
    assert_near(ds, case.ds, 1e-5)
    for got, wanted in zip(gradients, case.dflats, strict=True):
        assert_near(got, wanted, 1e-5)


@pytest.mark.parametrize("s_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_within_its_own_rounding_of_fp32(kind: str, s_dtype: torch.dtype) -> None:
    case = make_case(kind, torch.bfloat16, s_dtype)
    out, dx, ds, gradients = run(case, save=True)
    assert (out.dtype, dx.dtype, ds.dtype) == (torch.bfloat16, torch.bfloat16, s_dtype)
    for got, wanted in [(out, case.out), (dx, case.dx), (ds, case.ds), *zip(gradients, case.dflats, strict=True)]:
        assert (got.float() - wanted).norm() <= 0.015 * wanted.norm()


def test_an_expert_without_rows_gets_a_zero_gradient() -> None:
    case = make_case("silu_glu")
    *_, gradients = run(case, save=False)
    assert not gradients[EMPTY_EXPERT].any()


@pytest.mark.parametrize("kind", ["silu_glu", "gpt_oss_glu", "relu"])
def test_gradients_add_up_only_where_asked(kind: str) -> None:
    case = make_case(kind)
    accumulate = [expert % 2 == 0 for expert in range(NUM_EXPERTS)]
    *_, gradients = run(case, save=True, accumulate=accumulate, start=0.5)
    for got, wanted, adds in zip(gradients, case.dflats, accumulate, strict=True):
        assert_near(got - 0.5 if adds else got, wanted, 1e-5)


def test_backward_starts_from_what_forward_saved() -> None:
    case = make_case("silu_glu")
    experts = ExpertMath(case.spec)
    weights, gradients = experts.views(case.flats[0]), experts.views(torch.empty(case.spec.numel))
    x, g, s = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN), torch.rand(9)
    nothing_active = torch.full((9, 2 * INTERMEDIATE), -1e4)
    dx, ds = experts.backward(weights, x, s, g, nothing_active, gradients, accumulate=False)
    assert not dx.any() and not ds.any()


@pytest.mark.parametrize("chunk_bytes", [1, 2048, 1 << 30])
@pytest.mark.parametrize("save", [True, False])
def test_results_do_not_depend_on_how_experts_share_elementwise_passes(
    chunk_bytes: int, save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("silu_glu")
    wanted = run(case, save=save)
    monkeypatch.setattr(expert_math, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(expert_math, "CHUNK_WEIGHT_BYTES", chunk_bytes)
    got = run(case, save=save)
    for left, right in zip([*got[:3], *got[3]], [*wanted[:3], *wanted[3]], strict=True):
        assert_near(left, right, 1e-6)


def test_one_expert_equals_its_part_of_many_and_may_save_in_part() -> None:
    case = make_case("silu_glu")
    experts = ExpertMath(case.spec)
    weights = [experts.views(flat) for flat in case.flats]
    counts = [5, 0, 7]
    x, g, s = torch.randn(12, HIDDEN), torch.randn(12, HIDDEN), torch.rand(12)
    out, saved = experts.forward_many(weights[:3], counts, x, s, save=True)
    assert saved is not None
    gradients = [experts.views(torch.empty(case.spec.numel)) for _ in range(4)]
    partly = [saved[0], None, None]
    dx, ds = experts.backward_many(weights[:3], counts, x, s, g, partly, gradients[:3], accumulate=[False] * 3)
    one_out, one_saved = experts.forward(weights[2], x[5:], s[5:], save=True)
    one_dx, one_ds = experts.backward(weights[2], x[5:], s[5:], g[5:], one_saved, gradients[3], accumulate=False)
    torch.testing.assert_close((one_out, one_dx, one_ds), (out[5:], dx[5:], ds[5:]))
    torch.testing.assert_close(gradients[3], gradients[2])


def test_results_land_in_given_rows_and_inputs_stay() -> None:
    case = make_case("silu_glu")
    experts = ExpertMath(case.spec)
    weights, gradients = [experts.views(case.flats[0])], [experts.views(torch.empty(case.spec.numel))]
    x, g, s = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN), torch.rand(9)
    before = [tensor.clone() for tensor in (x, g, s, case.flats[0])]
    out, dx = torch.empty(9, HIDDEN), torch.empty(9, HIDDEN)
    assert experts.forward_many(weights, [9], x, s, save=False, out_SH=out)[0] is out
    got, _ = experts.backward_many(weights, [9], x, s, g, None, gradients, accumulate=[False], dx_SH=dx)
    assert got is dx
    for left, right in zip((x, g, s, case.flats[0]), before, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("chunk_experts", [1, 2, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_equals_one_expert_after_another(
    kind: str, chunk_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(kind)
    largest = max(tensor.numel for tensor in case.spec.tensors) * 4
    monkeypatch.setattr(expert_math_grouped, "GRADIENT_CHUNK_BYTES", chunk_experts * largest)
    grouped, routing = GroupedExpertMath(case.spec, case.module), sort_by_expert(case.index_Tk, NUM_EXPERTS)
    # A slot without rows lies between the others; neither it nor the end of any slot may be read.
    slots = torch.full((NUM_EXPERTS, case.spec.numel + 8), math.nan)
    used = [expert for expert in range(NUM_EXPERTS) if routing.counts_E[expert]]
    assert used[-1] > EMPTY_EXPERT and EMPTY_EXPERT not in used
    for expert in used:
        slots[expert, : case.spec.numel] = case.flats[expert]
    adds = [expert % 2 == 0 for expert in used]
    flats = [torch.full((case.spec.numel,), 0.5 if is_sum else math.nan) for is_sum in adds]
    gradients = [ExpertMath(case.spec, case.module).views(flat) for flat in flats]
    x_SH, s_S, g_SH = gather(case.x_TH, routing), case.s_Tk.reshape(-1)[routing.order_S], gather(case.g_TH, routing)
    rows = grouped.views(slots[:, : case.spec.numel]), routing.counts_E, x_SH, s_S
    out_SH, dx_SH = torch.empty_like(x_SH), torch.empty_like(x_SH)
    grouped.forward_grouped(*rows, out_SH)
    ds_S = grouped.backward_grouped(*rows, g_SH, gradients, accumulate=adds, dx_SH=dx_SH)
    assert_near(combine(out_SH, routing, NUM_TOKENS, TOP_K), case.out, 1e-5)
    assert_near(combine(dx_SH, routing, NUM_TOKENS, TOP_K), case.dx, 1e-5)
    assert_near(ds_S, case.ds.reshape(-1)[routing.order_S], 1e-5)
    for expert, got, is_sum in zip(used, flats, adds, strict=True):
        assert_near(got - 0.5 if is_sum else got, case.dflats[expert], 1e-5)


@pytest.mark.parametrize(
    ("change", "dtype", "capability", "wanted"),
    [
        (dict(), torch.bfloat16, (9, 0), True),
        (dict(), torch.bfloat16, (10, 0), True),
        (dict(), torch.bfloat16, (8, 0), False),
        (dict(), torch.bfloat16, (12, 0), False),
        (dict(), torch.float32, (9, 0), False),
        (dict(), torch.float32, None, True),
        (dict(hidden_size=20), torch.bfloat16, (9, 0), False),
        (dict(hidden_size=20), torch.bfloat16, None, False),
        (dict(hidden_size=20), torch.float32, None, True),
        (dict(intermediate_size=28), torch.bfloat16, (9, 0), False),
        (dict(slot_numel=2004), torch.bfloat16, (9, 0), False),
        (dict(slot_numel=2004), torch.bfloat16, None, True),
        (dict(up_numel=772), torch.bfloat16, (9, 0), False),
    ],
)
def test_experts_are_grouped_only_where_a_kernel_takes_them(
    change: dict[str, int], dtype: torch.dtype, capability: tuple[int, int] | None, wanted: bool
) -> None:
    change = dict(hidden_size=16, intermediate_size=24, slot_numel=2000, up_numel=768) | change
    slot_numel, up_numel = change.pop("slot_numel"), change.pop("up_numel")
    tensors = (TensorSpec(name="gate_up_proj", shape=(up_numel,)), TensorSpec(name="down_proj", shape=(384,)))
    spec = replace(make_spec("silu_glu", make_module("silu_glu")), tensors=tensors, **change)
    assert can_group(spec, dtype, slot_numel=slot_numel, cuda_capability=capability) == wanted


def test_gradients_under_way_are_bounded_by_a_chunk_but_one_tensor_always_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec("silu_glu", make_module("silu_glu"))
    largest_bytes = 2 * HIDDEN * INTERMEDIATE * 2
    for chunk_bytes, wanted in (
        (1, largest_bytes),
        (3 * largest_bytes, 3 * largest_bytes),
        (1 << 30, 6 * largest_bytes),
    ):
        monkeypatch.setattr(expert_math_grouped, "GRADIENT_CHUNK_BYTES", chunk_bytes)
        assert gradient_chunk_bytes(spec, torch.bfloat16) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="tanh"), "activation: got 'tanh', wanted one of"),
        (dict(activation="silu"), "activation: got 'silu' for experts that are gated"),
        (dict(activation="module"), "activation_module: got None"),
    ],
)
def test_unknown_activations_are_refused(change: dict[str, Any], message: str) -> None:
    spec = replace(make_spec("silu_glu", make_module("silu_glu")), **change)
    with pytest.raises(ValueError, match=message):
        ExpertMath(spec)


def test_rows_that_do_not_fit_the_counts_are_refused() -> None:
    case = make_case("silu_glu")
    experts = ExpertMath(case.spec)
    with pytest.raises(ValueError, match="counts: got 1 counts that add up to 3"):
        experts.forward_many([experts.views(case.flats[0])], [3], torch.randn(4, HIDDEN), torch.rand(4), save=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_gradients_may_be_computed_later(kind: str, accumulate: bool) -> None:
    case = make_case(kind)
    experts = ExpertMath(case.spec, case.module)
    weights = [experts.views(flat) for flat in case.flats[:3]]
    counts = [5, 0, 7]
    x, g, s = torch.randn(12, HIDDEN), torch.randn(12, HIDDEN), torch.rand(12)
    start = torch.randn(2, 3, case.spec.numel)
    start[1] = start[0]
    wanted, got = ([experts.views(flat) for flat in flats] for flats in start)
    wanted_dx, wanted_ds = experts.backward_many(weights, counts, x, s, g, None, wanted, accumulate=[accumulate] * 3)
    dx, kept = torch.empty_like(x), experts.weight_rows(12, x.new_empty)
    ds, works = experts.backward_inputs(weights, counts, x, s, g, kept, dx_SH=dx)
    torch.testing.assert_close((dx, ds), (wanted_dx, wanted_ds))
    assert torch.equal(start[1], torch.cat([view.flatten() for views in got for view in views.values()]).view(3, -1))
    g.fill_(torch.nan)
    for flat in case.flats:
        flat.fill_(torch.nan)
    for work, gradients in reversed(list(zip(works, got, strict=True))):
        experts.weight_gradients(work, gradients, accumulate=accumulate)
    torch.testing.assert_close(start[1], start[0])
