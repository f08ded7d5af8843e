"""Decoupled models are transformers' models: saved, loaded, generated with, found by the Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.models.decoupled.conftest import DECODERS, tiny, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DistilBertConfig,
)

from isthmus.models.decoupled.architectures import auto_class_of, layers_of
from isthmus.models.decoupled.configs import decoupled_config, is_decoupled
from isthmus.spec.errors import IsthmusError

FORM = {"num_sub_blocks": 4, "original_layers": [2]}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_saved_and_loaded_is_the_same_model(family: str, tmp_path: Path) -> None:
    head = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    model = head.from_config(decoupled_config(tiny(family), FORM)).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.base_model_type) == (f"decoupled_{family}", family)
    assert (config.num_sub_blocks, config.original_layers) == (4, [2])
    loaded = head.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert auto_class_of(config) == head.__name__


def test_bare_and_headed_classes_hold_decoupled_layers(family: str) -> None:
    config = decoupled_config(tiny(family), FORM)
    heads = [AutoModel, AutoModelForSequenceClassification]
    if family not in ("mistral",):
        heads.append(AutoModelForQuestionAnswering)
    for head in heads:
        kinds = [type(layer).__name__.startswith("Decoupled") for layer in layers_of(head.from_config(config))]
        assert kinds == [True, True, False]


def test_hidden_states_of_every_layer_are_recorded(family: str) -> None:
    model = AutoModel.from_config(decoupled_config(tiny(family), FORM)).eval()
    with torch.no_grad():
        output = model(tokens(), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_the_cache_is_that_without(family: str, num_beams: int) -> None:
    model = AutoModelForCausalLM.from_config(decoupled_config(tiny(family), FORM)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    prompt, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    options = dict(max_new_tokens=12, do_sample=False, num_beams=num_beams, pad_token_id=0, eos_token_id=None)
    runs = [model.generate(prompt, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert runs[0].shape == (2, 17) and torch.equal(*runs)


def test_gradients_reach_every_parameter_of_decoupled_layers(family: str) -> None:
    model = AutoModel.from_config(decoupled_config(tiny(family), FORM))
    model(tokens()).last_hidden_state.square().sum().backward()
    for name, parameter in layers_of(model)[0].named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) or name.endswith(
            ("key.bias", "k_proj.bias")
        )


@pytest.mark.parametrize(
    "order",
    [
        "import isthmus; from transformers import AutoConfig, AutoModel",
        "import isthmus; from transformers import AutoModel, AutoConfig",
        "from transformers import AutoConfig, AutoModel; import isthmus",
    ],
)
def test_auto_classes_know_decoupled_models_whatever_is_imported_first(order: str, tmp_path: Path) -> None:
    AutoModel.from_config(decoupled_config(tiny("bert"), FORM)).save_pretrained(tmp_path)
    script = f"{order}\nprint(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "DecoupledBertModel"


def test_importing_isthmus_leaves_torch_and_transformers_unloaded() -> None:
    script = "import isthmus, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_what_cannot_be_decoupled_is_refused() -> None:
    with pytest.raises(IsthmusError, match=r"model: a 'distilbert' cannot be decoupled; wanted one of bert, roberta"):
        decoupled_config(DistilBertConfig(), FORM)
    config = decoupled_config(tiny("bert"), FORM)
    assert is_decoupled(config) and not is_decoupled(tiny("bert"))
    with pytest.raises(IsthmusError, match=r"model: is already decoupled, into 4 sub-blocks; wanted the original"):
        decoupled_config(config, FORM)
