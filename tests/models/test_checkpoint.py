"""Reading and writing together: what goes in comes out, bit by bit, in either direction."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.config import load_config
from isthmus.models.moe_model import MoeModel, unit_views
from isthmus.models.reader import read_checkpoint
from isthmus.models.skeleton import torch_dtype
from isthmus.models.tiny import tiny_config, write_random_checkpoint, write_tiny_checkpoint
from isthmus.models.writer import write_checkpoint


def all_tensors(path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert got[key].dtype == wanted[key].dtype and torch.equal(got[key], wanted[key]), key


def transformers_parameters(path, dtype: str) -> dict[str, torch.Tensor]:
    auto_class = AutoModelForSeq2SeqLM if load_config(path).is_encoder_decoder else AutoModelForCausalLM
    loaded: Any = auto_class.from_pretrained(path, dtype=torch_dtype(dtype), output_loading_info=True)
    module, info = loaded
    assert not any(info.values()), info
    return module.state_dict()


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_read_then_write_gives_what_save_pretrained_wrote(family, dtype, max_shard_bytes, checkpoint, load, tmp_path):
    path = checkpoint(family, dtype)
    loaded = load(path, dtype)
    write_checkpoint(
        tmp_path, loaded.model, loaded.unit, dtype=dtype, max_shard_bytes=max_shard_bytes, tokenizer_from=path
    )
    got, wanted = all_tensors(tmp_path), all_tensors(path)
    if dtype == "bf16" and family in ("switch_transformers", "nllb-moe"):
        assert {key for key in got if got[key].dtype == torch.float32} == {k for k in got if "router.classifier" in k}
        got = {key: tensor.bfloat16() for key, tensor in got.items()}
    assert_same(got, wanted)
    assert (tmp_path / "config.json").read_text() == (path / "config.json").read_text()
    assert (tmp_path / "generation_config.json").read_text() == (path / "generation_config.json").read_text()
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files == 1 if max_shard_bytes > 20_000 else num_files > 3
    assert_same(transformers_parameters(tmp_path, dtype), transformers_parameters(path, dtype))
    assert_same_units(load(tmp_path, dtype), loaded)


def assert_same_units(got, wanted) -> None:
    for key, flat in wanted.flats.items():
        assert torch.equal(got.flats[key], flat), key


def test_fused_files_read_like_files_per_expert(family, checkpoint, load, tmp_path):
    path = checkpoint(family)
    auto_class = AutoModelForSeq2SeqLM if load_config(path).is_encoder_decoder else AutoModelForCausalLM
    auto_class.from_pretrained(path).save_pretrained(tmp_path, save_original_format=False)
    is_per_expert = family not in ("gpt_oss", "switch_transformers", "nllb-moe")
    assert (all_tensors(tmp_path).keys() != all_tensors(path).keys()) == is_per_expert
    assert_same_units(load(tmp_path, "fp32"), load(path, "fp32"))


def test_sharded_files_of_transformers_are_read(checkpoint, load, tmp_path):
    path = checkpoint("olmoe")
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_units(load(tmp_path, "fp32"), load(path, "fp32"))


@pytest.mark.parametrize(("stored", "asked"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_values_are_cast_to_the_dtype_asked_for(stored, asked, checkpoint, load):
    got, wanted = load(checkpoint("mixtral", stored), asked), load(checkpoint("mixtral", stored), stored)
    for key, flat in wanted.flats.items():
        assert torch.equal(got.flats[key], flat.to(torch_dtype(asked)))


def test_bf16_memory_can_be_written_as_fp32(checkpoint, load, tmp_path):
    loaded = load(checkpoint("mixtral", "bf16"), "bf16")
    write_checkpoint(tmp_path, loaded.model, loaded.unit, dtype="fp32", tokenizer_from=None)
    assert load_config(tmp_path).dtype == torch.float32
    assert_same(all_tensors(tmp_path), {k: t.float() for k, t in all_tensors(checkpoint("mixtral", "bf16")).items()})


def test_only_the_layers_asked_for_are_read(checkpoint, load, reference, batch, tmp_path):
    path = checkpoint("deepseek_v3")
    loaded = load(path, "fp32", num_layers=2)
    assert loaded.model.spec.moe_layers == (1,)
    write_checkpoint(tmp_path, loaded.model, loaded.unit, dtype="fp32", tokenizer_from=None)
    plain = reference(tmp_path)
    assert len(plain.model.layers) == 2
    torch.testing.assert_close(loaded.forward(batch).logits, plain(**batch).logits, atol=1e-6, rtol=1e-5)


def test_progress_rises_to_one(checkpoint):
    path = checkpoint("mixtral")
    model = MoeModel.build(load_config(path), "fp32")
    flats = {key: torch.empty(layout.numel) for key, layout in model.layouts.items()}
    shares: list[float] = []
    read_checkpoint(path, model, lambda key: unit_views(model.layouts[key], flats[key]), progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0 < shares[0] < 0.5


def test_tokenizer_files_are_copied_and_nothing_else(checkpoint, load, tmp_path):
    loaded = load(checkpoint("mixtral"), "fp32")
    source, output = tmp_path / "source", tmp_path / "output"
    for directory in (source, output):
        directory.mkdir()
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in (*tokenizer, "README.md", "model-00001-of-00001.safetensors"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    write_checkpoint(output, loaded.model, loaded.unit, dtype="fp32", tokenizer_from=source)
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in output.iterdir()} == {*tokenizer} | written
    assert json.loads((output / "generation_config.json").read_text()) == {"temperature": 0.5}


def test_random_checkpoints_load_and_depend_on_the_seed_alone(family, load, tmp_path):
    config = tiny_config(family)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(config, tmp_path / name, seed, max_shard_bytes=50_000)
    first = all_tensors(tmp_path / "a")
    assert_same(all_tensors(tmp_path / "b"), first)
    assert not all(torch.equal(t, first[key]) for key, t in all_tensors(tmp_path / "c").items())
    transformers_parameters(tmp_path / "a", "fp32")


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of a Mixtral checkpoint to damage, with its tensors; ``save`` writes them back."""
    path = tmp_path / "broken"
    shutil.copytree(checkpoint("mixtral"), path)
    return path, load_file(path / "model.safetensors")


EXPERT_KEY = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def test_missing_tensors_are_named(broken, load):
    path, tensors = broken
    for key in (EXPERT_KEY, "model.norm.weight"):
        del tensors[key]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"broken lacks 2 of \d+ tensors: {EXPERT_KEY}, model.norm.weight"):
        load(path, "fp32")


def test_half_of_a_fused_tensor_is_missed(broken, load):
    path, tensors = broken
    del tensors["model.layers.0.block_sparse_moe.experts.0.w3.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks 1 of \d+ tensors: model.layers.0.block_sparse_moe.experts.0.w3.weight"
    ):
        load(path, "fp32")


def test_wrong_shapes_are_named(broken, load):
    path, tensors = broken
    tensors[EXPERT_KEY] = torch.zeros(32, 47)
    save_file(tensors, path / "model.safetensors")
    match = rf"{EXPERT_KEY} in .*broken/model.safetensors has shape \(32, 47\), wanted \(32, 48\)"
    with pytest.raises(ValueError, match=match):
        load(path, "fp32")


def test_unexpected_tensors_are_warned_of_once(broken, load):
    path, tensors = broken
    extra = {f"model.layers.0.extra.{i}": torch.zeros(1) for i in range(7)}
    save_file(tensors | extra, path / "model.safetensors")
    match = r"has 7 tensors that MixtralForCausalLM has no place for, skipped: model.layers.0.extra.0, .* and 2 more"
    with pytest.warns(UserWarning, match=match) as caught:
        load(path, "fp32")
    assert len(caught) == 1


def test_tensors_that_transformers_ignores_are_not_warned_of(broken, load):
    path, tensors = broken
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, "fp32")


def test_a_truncated_file_is_named(broken, load):
    path, _ = broken
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"broken/model.safetensors is truncated: \d+ bytes, wanted \d+; .* is not all there"
    ):
        load(path, "fp32")


def test_a_missing_shard_and_a_damaged_index_are_named(broken, load):
    path, _ = broken
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing, .*index.json names it"):
        load(path, "fp32")
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged .* wanted JSON with a weight_map"):
        load(path, "fp32")


def test_pickles_are_never_loaded(broken, load):
    path, _ = broken
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        load(path, "fp32")
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"has pytorch_model.bin but no model.safetensors; pickled .* never loaded"
    ):
        load(path, "fp32")


def test_output_must_be_an_empty_directory(checkpoint, load, tmp_path):
    loaded = load(checkpoint("mixtral"), "fp32")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="must be an existing, empty directory"):
            write_checkpoint(path, loaded.model, loaded.unit, dtype="fp32", tokenizer_from=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="max_shard_bytes: got 0, wanted a positive number"):
        write_checkpoint(
            tmp_path / "empty", loaded.model, loaded.unit, dtype="fp32", max_shard_bytes=0, tokenizer_from=None
        )


def test_a_directory_is_its_own_checkpoint_and_a_missing_one_is_named(tmp_path):
    assert resolve_checkpoint(str(tmp_path)) == resolve_checkpoint(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"model: .*/none is not a directory, wanted a checkpoint directory or"):
        resolve_checkpoint(str(tmp_path / "none"))


def test_unknown_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match="family: got 'bert', wanted one of mixtral, qwen2_moe"):
        write_tiny_checkpoint("bert", tmp_path, seed=0, dtype="fp32")
