from __future__ import annotations

import huggingface_hub.constants
import pytest
from transformers import AutoConfig, LlamaConfig

from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.config import load_config, model_spec
from isthmus.models.tiny import tiny_config
from isthmus.spec.model import ModelSpec


def saved(config, path) -> str:
    config.save_pretrained(path)
    return str(path)


def test_spec_of_a_saved_configuration_is_the_spec_of_the_configuration(family, tmp_path):
    config = tiny_config(family)
    spec = model_spec(load_config(saved(config, tmp_path)))
    assert isinstance(spec, ModelSpec) and spec == model_spec(config)


@pytest.mark.parametrize("keep", [2, 3])
def test_fewer_layers_survive_a_round_trip(family, keep, tmp_path):
    sparse = dict(num_sparse_encoder_layers=2, num_sparse_decoder_layers=2) if family == "switch_transformers" else {}
    is_listed = family in ("switch_transformers", "nllb-moe")
    counts = {
        "switch_transformers": ("num_layers", "num_decoder_layers"),
        "nllb-moe": ("encoder_layers", "decoder_layers"),
    }
    names = counts.get(family, ("num_hidden_layers",))
    full = tiny_config(family, **dict.fromkeys(names, 4), **sparse)
    short = load_config(saved(full, tmp_path / "full"), num_layers=keep)
    spec, whole = model_spec(short), model_spec(full)
    assert spec.num_layers == keep * len(names) and whole.num_layers == 4 * len(names)
    assert spec.layers[:keep] == whole.layers[:keep] and is_listed == (len(names) == 2)
    saved(short, tmp_path / "short")
    assert model_spec(AutoConfig.from_pretrained(tmp_path / "short")) == spec


def test_more_layers_than_there_are_is_refused(tmp_path):
    path = saved(tiny_config("mixtral"), tmp_path)
    for num_layers in (0, 3):
        with pytest.raises(
            ValueError, match=f"num_layers: got {num_layers}, wanted 1 to 2, the layers that 'mixtral' has"
        ):
            load_config(path, num_layers=num_layers)


def test_layers_that_leave_no_routed_expert_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no routed experts in its 1 layers; wanted a Mixture"):
        load_config(saved(tiny_config("deepseek_v2"), tmp_path), num_layers=1)


def test_what_is_no_moe_model_is_refused(tmp_path):
    dense = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=32, num_attention_heads=4)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM \('llama'\) has no routed experts .* Mixtral, Qwen2-MoE, Qwen3"
    ):
        load_config(saved(dense, tmp_path))


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"model: .*/none is not a directory, wanted a checkpoint directory or a Hug"
    ):
        load_config(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no config.json, wanted a Hugging Face checkpoint directory"):
        load_config(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    match = "model: nobody/no-such-model is neither a directory nor a Hugging Face id that can be reached"
    with pytest.raises(FileNotFoundError, match=match):
        load_config("nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match=r"nobody/no-such-model is neither .* that can be downloaded"):
        resolve_checkpoint("nobody/no-such-model")


def test_an_unknown_kind_of_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ValueError, match=r"cannot read the configuration of .*no_such_type"):
        load_config(tmp_path)
