"""What crosses between processes is found from the model's own code, without weights, for every family."""

from __future__ import annotations

import pytest
import torch
from tests.tuning.pipeline.test_exactness import layers

from isthmus.models.attention import use_blocked_attention
from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.models.tiny import FAMILIES, tiny_config
from isthmus.profiling.dense import no_experts
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data import keep_documents_apart
from isthmus.tuning.pipeline.links import Form
from isthmus.tuning.pipeline.route import Route, find_route, ghost_of
from isthmus.tuning.pipeline.steering import Steering

CPU = torch.device("cpu")


def route_of(family: str, *, dtype: str = "fp32", is_packed: bool = False, **changes: float) -> Route:
    """Of micro-batches (2, 8), each sequence with padding or, ``is_packed``, of two documents."""
    model = MoeModel.build(tiny_config(family, **layers(family, 4), **changes), dtype)
    model.set_experts_function(no_experts)
    model.module.train()
    keep_documents_apart(model.module)
    use_blocked_attention(model.module)
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.ones(2, 8, dtype=torch.long)}
    if model.spec.is_encoder_decoder:
        inputs["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    elif is_packed:
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    return find_route(model, Steering(model), inputs, model.forward_arguments(), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_cross_every_border_and_masks_none(family: str) -> None:
    route = route_of(family)
    assert len(route.layers) == 4
    for layer in route.layers:
        assert layer.inputs[0].form == Form((2, 8, 32), torch.float32)
        assert layer.inputs[0].is_differentiable
        assert layer.outputs[0].form == Form((2, 8, 32), torch.float32)
    if family not in ("switch_transformers", "nllb-moe"):
        assert [len(layer.inputs) for layer in route.layers] == [1] * 4
        assert [layer.follows_outer for layer in route.layers] == [True, False, False, False]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_one_sequence_change_nothing_that_crosses(family: str, dtype: str) -> None:
    packed, plain = (route_of(family, dtype=dtype, is_packed=is_packed) for is_packed in (True, False))
    assert [layer.inputs for layer in packed.layers] == [layer.inputs for layer in plain.layers]
    assert packed.layers[0].inputs[0].form.dtype == torch_dtype(dtype)


def test_an_encoders_output_and_position_biases_cross_too() -> None:
    nllb, switch = route_of("nllb-moe"), route_of("switch_transformers")
    assert [layer.follows_outer for layer in nllb.layers] == [True, False, True, False]
    assert [len(layer.inputs) for layer in nllb.layers] == [1, 1, 2, 2]
    assert [layer.follows_outer for layer in switch.layers] == [True, False, True, False]
    # Hidden states, the bias of self-attention, the encoder's output, and cross-attention's bias, a mask that the
    # decoder's first layer makes: its values must travel, its gradient need not.
    assert [len(layer.inputs) for layer in switch.layers] == [1, 2, 2, 4]
    assert sum(passing.is_differentiable for passing in switch.layers[3].inputs) == 3


def test_router_logits_are_known_where_a_layer_has_experts() -> None:
    route = route_of("qwen2_moe")
    assert [layer.router_logits for layer in route.layers] == [None, *[Form((16, 8), torch.float32)] * 3]


def test_finding_a_route_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    route_of("nllb-moe", dropout=0.5)
    assert torch.equal(torch.rand(1), wanted)


def test_a_model_that_skips_layers_is_refused() -> None:
    with pytest.raises(IsthmusError, match=r"encoder_layerdrop: got 0\.1 in config.json, wanted 0"):
        route_of("nllb-moe", encoder_layerdrop=0.1)


def test_a_model_that_runs_its_layers_in_another_order_is_refused() -> None:
    model = MoeModel.build(tiny_config("mixtral", num_hidden_layers=3), "fp32")
    model.set_experts_function(no_experts)
    layers_of_model = model.module.get_submodule("model.layers")
    assert isinstance(layers_of_model, torch.nn.ModuleList)
    layers_of_model[1], layers_of_model[2] = layers_of_model[2], layers_of_model[1]
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    with pytest.raises(IsthmusError, match="came to layer 2 where another was due"):
        find_route(model, Steering(model), inputs, model.forward_arguments(), CPU)


def test_a_layer_whose_shapes_depend_on_values_is_refused() -> None:
    model = MoeModel.build(tiny_config("mixtral"), "fp32")
    model.layers[1].forward = lambda hidden, **rest: hidden[hidden.nonzero(as_tuple=True)]
    model.set_experts_function(no_experts)
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    with pytest.raises(IsthmusError, match=r"MixtralDecoderLayer cannot be run without values .*; start one process"):
        find_route(model, Steering(model), inputs, model.forward_arguments(), CPU)


def test_a_ghost_takes_no_memory_and_is_not_a_number() -> None:
    ghost = ghost_of(Form((1000, 1000), torch.float32), CPU)
    assert ghost.untyped_storage().nbytes() == 4
    assert torch.isnan(ghost).all()


def test_who_counts_what_autograd_saves_counts_nothing_of_finding_it() -> None:
    saved: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        route_of("mixtral", is_packed=True)
    assert not saved
