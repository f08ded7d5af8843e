"""Which parameter is stepped by which optimizer, and how matrices are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.decoupled.conftest import TINY, tiny, tokens
from transformers import AutoModel

from isthmus.decoupling.optimizers import optimizers_of
from isthmus.models.decoupled.architectures import layers_of
from isthmus.models.decoupled.configs import decoupled_config

WIDTHS = [8, 8, 16]


def model_of(family: str) -> Any:
    fields = {"num_sub_blocks": 3, "original_layers": [2], "sub_block_widths": WIDTHS}
    return AutoModel.from_config(decoupled_config(tiny(family), fields))


def up_of(model: Any) -> Any:
    """The first layer's first matrix of the MLP."""
    layer: Any = layers_of(model)[0]
    return layer.intermediate.dense


@pytest.mark.parametrize("family", TINY)
def test_every_parameter_has_one_optimizer_and_slices_are_cut_apart(family: str) -> None:
    model = model_of(family)
    adamw, muon = optimizers_of(model, matrix_factor=2.0, weight_decay=0.0)
    groups = [*adamw.param_groups, *muon.param_groups]
    owned = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    layers = layers_of(model)
    for group in muon.param_groups:
        assert group["lr_factor"] == 2.0
        for parameter in group["params"]:
            in_original = any(parameter is other for other in layers[2].parameters())
            assert (group["parts"] is None) == in_original
            if group["parts"] is not None:
                dim, sizes = group["parts"]
                assert list(sizes) == WIDTHS and parameter.shape[dim] == sum(WIDTHS)


def test_without_a_factor_all_is_adamw() -> None:
    assert len(optimizers_of(model_of("bert"), matrix_factor=0.0, weight_decay=0.0)) == 1


def test_a_sub_blocks_update_is_that_of_its_matrix_alone() -> None:
    """What one sub-block's gradient is does not change another's step."""
    model, other = model_of("bert"), model_of("bert")
    other.load_state_dict(model.state_dict())
    for one, scale in ((model, 1.0), (other, 100.0)):
        muon = optimizers_of(one, matrix_factor=1.0, weight_decay=0.0)[1]
        one(input_ids=tokens()).last_hidden_state.square().sum().backward()
        weight = up_of(one).weight
        weight.grad[:, 16:] *= scale  # the last slice's alone
        muon.step()
    ours, theirs = (up_of(one).weight for one in (model, other))
    torch.testing.assert_close(ours[:, :16], theirs[:, :16])
