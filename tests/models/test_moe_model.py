from __future__ import annotations

import pytest
import torch
from transformers import Glm4MoeConfig, GraniteMoeConfig, LlamaConfig, ViTConfig

from isthmus.models.layouts import expert_names
from isthmus.models.moe_model import MoeModel, unit_views
from isthmus.models.reader import read_checkpoint
from isthmus.models.skeleton import build_skeleton
from isthmus.models.tiny import tiny_config, write_random_checkpoint
from isthmus.spec.model import DENSE, DENSE_FP32, OUTER_LAYER, UnitKey


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def test_logits_and_loss_equal_plain_transformers(family, checkpoint, load, reference, batch):
    loaded, plain = load(checkpoint(family), "fp32"), reference(checkpoint(family))
    got, wanted = loaded.forward(batch), plain(**batch, **loaded.model.forward_arguments())
    assert relative_error(got.logits, wanted.logits) <= 2e-6
    assert relative_error(got.loss, wanted.loss) <= 2e-6


@pytest.mark.parametrize("config_class", [GraniteMoeConfig, Glm4MoeConfig])
def test_families_that_isthmus_has_never_heard_of_work_alike(config_class, load, reference, batch, tmp_path):
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    write_random_checkpoint(config_class(**sizes, **heads, n_routed_experts=8), tmp_path, seed=0)
    loaded, plain = load(tmp_path, "fp32"), reference(tmp_path)
    assert relative_error(loaded.forward(batch).logits, plain(**batch).logits) <= 2e-6


def test_gradients_of_every_unit_equal_plain_transformers(family, checkpoint, load, reference, batch):
    loaded, plain = load(checkpoint(family), "fp32"), reference(checkpoint(family))
    loaded.forward(batch).loss.backward()
    plain(**batch, **loaded.model.forward_arguments()).loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for key in loaded.model.layouts:
        if not key.is_expert:
            for name, parameter in loaded.model.parameters_of(key).items():
                torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=2e-5)
    for layer, parts in loaded.model.moe_parts.items():
        for name, (listed, tensor) in expert_names(parts).items():
            for expert in range(parts.spec.num_experts) if listed is None else (listed,):
                key = UnitKey(layer, expert)
                got = unit_views(loaded.model.layouts[key], gradient_or_zeros(loaded.flats[key]))[tensor]
                whole = gradients[name] if gradients[name] is not None else torch.zeros(got.shape)
                torch.testing.assert_close(got, whole[expert] if listed is None else whole, atol=1e-6, rtol=2e-5)


def gradient_or_zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def test_bf16_logits_equal_plain_transformers(family, checkpoint, load, reference, batch):
    path = checkpoint(family, "bf16")
    got = load(path, "bf16").forward(batch)
    wanted = reference(path, "bf16")(**batch)
    assert relative_error(got.logits.float(), wanted.logits.float()) <= 2e-2


def test_units_cover_every_parameter_exactly_once(family):
    model = MoeModel.build(tiny_config(family), "bf16")
    numel = sum(parameter.numel() for parameter in model.module.parameters())
    assert sum(layout.numel for layout in model.layouts.values()) == numel == model.spec.num_parameters
    names = [tensor.name for key, layout in model.layouts.items() if not key.is_expert for tensor in layout.tensors]
    assert len(names) == len(set(names))
    assert [key for key in model.layouts if key.is_expert] == [
        UnitKey(layer, expert) for layer, parts in model.moe_parts.items() for expert in range(parts.spec.num_experts)
    ]


def test_spec_has_the_layers_of_the_family(family):
    spec = MoeModel.build(tiny_config(family), "fp32").spec
    wanted = {
        "qwen2_moe": (1, 2),
        "deepseek_v2": (1, 2),
        "deepseek_v3": (1, 2),
        "switch_transformers": (1, 3),
        "nllb-moe": (1, 3),
    }
    assert spec.moe_layers == wanted.get(family, (0, 1))
    assert spec.is_encoder_decoder == (family in ("switch_transformers", "nllb-moe"))
    expert = spec.layers[spec.moe_layers[0]]
    activations = {"gpt_oss": "gpt_oss_glu", "switch_transformers": "relu", "nllb-moe": "relu"}
    assert expert is not None and expert.activation == activations.get(family, "silu_glu")
    assert expert.top_k == (1 if family == "switch_transformers" else 2)
    assert (expert.hidden_size, expert.is_transposed) == (32, family == "gpt_oss")


def test_experts_stay_on_meta_and_nothing_else_does(family, checkpoint, load):
    loaded = load(checkpoint(family), "fp32")
    expert_parameters = {id(p) for experts in loaded.model.experts.values() for p in experts.parameters()}
    for name, parameter in loaded.model.module.named_parameters():
        assert parameter.is_meta == (id(parameter) in expert_parameters), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_buffers_equal_plain_transformers(family, dtype, checkpoint, load, reference):
    path = checkpoint(family, dtype)
    wanted = dict(reference(path, dtype).named_buffers())
    got = dict(load(path, dtype).model.module.named_buffers())
    assert got.keys() == wanted.keys()
    for name, buffer in got.items():
        assert buffer.dtype == wanted[name].dtype and torch.equal(buffer, wanted[name]), name


def test_routers_that_compute_in_fp32_have_fp32_units_in_bf16_models(family):
    model = MoeModel.build(tiny_config(family), "bf16")
    fp32 = {key.layer for key, layout in model.layouts.items() if layout.dtype == "fp32"}
    assert fp32 == (set(model.spec.moe_layers) if family in ("switch_transformers", "nllb-moe") else set())
    assert all(key.expert == DENSE_FP32 for key, layout in model.layouts.items() if layout.dtype == "fp32")


def test_rebinding_keeps_parameter_objects_and_ties(checkpoint, load):
    loaded = load(checkpoint("switch_transformers"), "fp32")
    key = UnitKey(OUTER_LAYER, DENSE)
    before = loaded.model.parameters_of(key)
    other = loaded.flats[key].clone()
    loaded.model.bind(key, other)
    after = loaded.model.parameters_of(key)
    assert all(after[name] is before[name] for name in before)
    assert after["shared.weight"].data_ptr() == other.data_ptr() and after["shared.weight"].requires_grad
    module = loaded.model.module
    assert module.lm_head.weight is module.encoder.embed_tokens.weight is after["shared.weight"]


def test_what_several_layers_share_lies_outside_every_layer():
    model = MoeModel.build(tiny_config("mixtral"), "fp32")
    layers = model.module.model.layers
    layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
    layers[1].mlp.gate = layers[0].mlp.gate
    shared = MoeModel(model.module, "fp32").layouts
    outer = {tensor.name for tensor in shared[UnitKey(OUTER_LAYER, DENSE)].tensors}
    assert {"model.layers.0.input_layernorm.weight", "model.layers.0.mlp.gate.weight"} <= outer
    names = [tensor.name for key, layout in shared.items() if not key.is_expert for tensor in layout.tensors]
    assert len(names) == len(set(names)) and "model.layers.1.mlp.gate.weight" not in names


def test_bound_memory_may_be_written_and_restored_between_forward_and_backward(checkpoint, load, batch):
    loaded = load(checkpoint("mixtral"), "fp32")
    loss = loaded.forward(batch).loss
    for key, flat in loaded.flats.items():
        if not key.is_expert:
            before = flat.clone()
            flat.zero_()
            flat.copy_(before)
    loss.backward()


def test_wrapped_logits_reach_the_auxiliary_loss_and_nothing_else(family, checkpoint, load, batch):
    loaded = load(checkpoint(family), "fp32")
    plain = loaded.forward(batch)
    seen = []

    def flatten(layer: int, logits: torch.Tensor) -> torch.Tensor:
        seen.append(layer)
        return logits * 0 + torch.arange(logits.shape[-1])

    loaded.model.wrap_routers(flatten)
    wrapped = loaded.forward(batch)
    assert seen == list(loaded.model.spec.moe_layers)
    assert torch.equal(plain.logits, wrapped.logits)
    assert (plain.loss == wrapped.loss).item() == ("output_router_logits" not in loaded.model.forward_arguments())
    loaded.model.wrap_routers(lambda layer, logits: logits)
    assert torch.equal(loaded.forward(batch).loss, plain.loss)


def test_router_bias_changes_the_routing(family, checkpoint, load, batch):
    loaded = load(checkpoint(family), "fp32")
    logits: dict[int, torch.Tensor] = {}
    chosen: dict[int, torch.Tensor] = {}
    loaded.model.wrap_routers(lambda layer, values: logits.setdefault(layer, values))
    loop = loaded.loop_over_experts

    def record(layer, experts, hidden_TH, index_Tk, weights_Tk):
        chosen[layer] = index_Tk
        return loop(layer, experts, hidden_TH, index_Tk, weights_Tk)

    loaded.model.set_experts_function(record)
    loaded.forward(batch)
    plain, layer = logits.copy(), loaded.model.spec.moe_layers[0]
    num_experts = logits[layer].shape[-1]
    for strength in (1.0, 20.0):  # the second replaces the first
        bias_E = torch.zeros(num_experts).index_fill(0, torch.tensor(1), strength)
        loaded.model.add_router_bias(layer, bias_E)
    logits.clear()
    loaded.forward(batch)
    torch.testing.assert_close(logits[layer], plain[layer] + bias_E)
    assert (chosen[layer] == 1).any(dim=-1).float().mean() > 0.9


def test_expert_capacity_drops_tokens_as_transformers_does(checkpoint, load, reference, batch):
    path = checkpoint("switch_transformers")
    loaded, plain = load(path, "fp32"), reference(path)
    for module in (*loaded.model.module.modules(), *plain.modules()):
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 1
    dropped = []
    loop = loaded.loop_over_experts

    def record(layer, experts, hidden_TH, index_Tk, weights_Tk):
        dropped.append((index_Tk == 4).sum().item())
        return loop(layer, experts, hidden_TH, index_Tk, weights_Tk)

    loaded.model.set_experts_function(record)
    assert relative_error(loaded.forward(batch).logits, plain(**batch).logits) <= 2e-6
    assert all(count >= 24 - 2 * 4 for count in dropped)


def test_nllb_drops_out_each_choice_by_itself(checkpoint, load, batch):
    loaded = load(checkpoint("nllb-moe"), "fp32")
    experts = next(iter(loaded.model.experts.values()))
    hidden_TH, rate = torch.randn(5, 32), 0.5
    probabilities_TE = torch.tensor([[0.6, 0.4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0.3, 0, 0.7], [0.5, 0, 0, 0.5]])
    plain = experts(hidden_TH, probabilities_TE > 0, probabilities_TE)
    assert torch.equal(plain[2], torch.zeros(32))
    experts.moe_token_dropout = rate
    assert torch.allclose(experts(hidden_TH, probabilities_TE > 0, probabilities_TE), plain * (1 - rate), atol=1e-6)
    experts.train()
    torch.manual_seed(0)
    many_TE = probabilities_TE.repeat(2000, 1)
    trained = experts(hidden_TH.repeat(2000, 1), many_TE > 0, many_TE).view(2000, 5, 32)
    assert (trained[:, 1] == 0).float().mean().item() == pytest.approx(rate, abs=0.02)  # one choice
    assert (trained[:, 0] == 0).float().mean().item() == pytest.approx(rate**2, abs=0.02)  # two choices
    torch.testing.assert_close(trained.mean(dim=0), plain, atol=0.1, rtol=0.1)


def test_auxiliary_loss_is_asked_for_only_where_it_counts():
    assert MoeModel.build(tiny_config("mixtral"), "fp32").forward_arguments() == {
        "use_cache": False,
        "output_router_logits": True,
    }
    without = MoeModel.build(tiny_config("mixtral", router_aux_loss_coef=0.0), "fp32")
    assert without.forward_arguments() == {"use_cache": False}


def test_build_leaves_the_configuration_as_it_is():
    config = tiny_config("mixtral")
    before = config.to_json_string(), config._experts_implementation
    MoeModel.build(config, "bf16")
    assert (config.to_json_string(), config._experts_implementation) == before


def test_dropout_inside_experts_is_warned_of():
    with pytest.warns(UserWarning, match=r"switch_transformers drops out 0.1 .* inside each routed expert"):
        MoeModel.build(tiny_config("switch_transformers", dropout_rate=0.1), "fp32")


def test_activations_that_isthmus_does_not_know_are_left_to_the_module():
    def activation(family: str, **overrides: object) -> str:
        spec = MoeModel.build(tiny_config(family, **overrides), "fp32").spec
        expert = spec.layers[spec.moe_layers[0]]
        assert expert is not None
        return expert.activation

    assert activation("mixtral", hidden_act="gelu") == "gelu_glu"
    assert activation("mixtral", hidden_act="gelu_pytorch_tanh") == "module"
    assert activation("gpt_oss", swiglu_limit=6.0) == "module"
    assert activation("switch_transformers", dense_act_fn="gelu") == "gelu"


def test_what_is_no_moe_model_is_refused():
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM .* no routed experts .* wanted a Mixture-of-Experts model: Mix"
    ):
        MoeModel.build(LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=32), "fp32")
    with pytest.raises(ValueError, match="'vit' has no causal language model"):
        MoeModel.build(ViTConfig(), "fp32")


def test_wrong_arguments_are_refused():
    model = MoeModel.build(tiny_config("qwen2_moe"), "fp32")
    outer = UnitKey(OUTER_LAYER, DENSE)
    with pytest.raises(ValueError, match="dtype: got 'fp16', wanted one of fp32, bf16"):
        MoeModel.build(tiny_config("mixtral"), "fp16")
    with pytest.raises(ValueError, match=r"flat: got \(3,\) torch.float32 for unit .* wanted \(\d+,\) torch.float32"):
        model.bind(outer, torch.zeros(3))
    with pytest.raises(ValueError, match="wanted a unit of this model that is not a routed expert"):
        model.bind(UnitKey(1, 0), torch.zeros(3))
    with pytest.raises(ValueError, match=r"is not bound; call MoeModel.bind first"):
        model.parameters_of(outer)
    with pytest.raises(ValueError, match=r"layer: got 0, wanted one with routed experts: \[1, 2\]"):
        model.add_router_bias(0, torch.zeros(8))
    with pytest.raises(ValueError, match=r"bias_E: got shape \(3,\) for layer 1, wanted \(8,\)"):
        model.add_router_bias(1, torch.zeros(3))
    with pytest.raises(ValueError, match="router_dtype: got bfloat16, wanted float32"):
        MoeModel.build(tiny_config("nllb-moe", router_dtype="bfloat16"), "bf16")
    with pytest.raises(RuntimeError, match=r"call MoeModel.set_experts_function before"):
        model.experts[1](torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))


def test_a_part_of_a_model_reads_its_own_units_only_and_all_of_each(family, checkpoint, load):
    whole, part = (
        load(checkpoint(family), "fp32"),
        MoeModel.build(load(checkpoint(family), "fp32").model.module.config, "fp32"),
    )
    part.restrict([1], has_outer=False)
    assert {key.layer for key in part.held_layouts} == {1}
    flats = {key: torch.full((layout.numel,), torch.nan) for key, layout in part.held_layouts.items()}
    read_checkpoint(checkpoint(family), part, lambda key: unit_views(part.held_layouts[key], flats[key]))
    for key, flat in flats.items():
        assert torch.equal(flat, whole.flats[key].detach())


def test_layers_that_share_parameters_cannot_be_divided():
    module = build_skeleton(tiny_config("mixtral"), "fp32")
    first, second = module.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    model = MoeModel(module, "fp32")
    with pytest.raises(ValueError, match=r"input_layernorm.weight of 'mixtral' belongs to model.layers.0 and to other"):
        model.restrict([0], has_outer=True)
