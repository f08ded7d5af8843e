"""Quantised checkpoints are read as transformers dequantises them, bit by bit; one expert is held twice at most."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantised import (
    WRITERS,
    convert_moe_packed_tensors_fp32,
    dequantised_fp8,
    quantise_fp8,
    save,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from isthmus.models.config import load_config
from isthmus.models.moe_model import MoeModel
from isthmus.models.quantisation import METHODS, stored_weights
from isthmus.models.safetensors_file import SafetensorsReader
from isthmus.models.tiny import tiny_config
from isthmus.models.writer import write_checkpoint

SCALES = {"mxfp4": "_scales", "fp8": "_scale_inv"}
NUMBERS = {"mxfp4": "_blocks", "fp8": ""}
WEIGHT = {
    "mxfp4": "model.layers.1.mlp.experts.down_proj",
    "fp8": "model.layers.1.mlp.experts.3.down_proj.weight",
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A quantised checkpoint by method, and the same dequantised by transformers. Do not change them."""
    known: dict[str, tuple[Path, Path]] = {}

    def get(method: str) -> tuple[Path, Path]:
        if method not in known:
            folder = tmp_path_factory.mktemp(method)
            known[method] = folder / "quantised", folder / "plain"
            WRITERS[method](*known[method])
        return known[method]

    return get


@pytest.fixture
def broken(method: str, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A quantised checkpoint to damage, with its tensors; ``save`` writes them back."""
    WRITERS[method](tmp_path / "broken", tmp_path / "plain")
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "broken").glob("*.safetensors"):
        tensors |= load_file(file)
    return tmp_path / "broken", tensors


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_weight_is_what_transformers_dequantises(dtype, method, pair, load):
    quantised, plain = pair(method)
    got, wanted = load(quantised, dtype), load(plain, dtype)
    for key, flat in wanted.flats.items():
        assert torch.equal(got.flats[key], flat), key


def test_transformers_loads_these_gpt_oss_checkpoints_and_finds_the_same(pair, load):
    quantised, _ = pair("mxfp4")
    module = AutoModelForCausalLM.from_pretrained(
        quantised, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    loaded = load(quantised, "fp32")
    for layer in loaded.model.spec.moe_layers:
        experts = module.model.layers[layer].mlp.experts
        for key in (key for key in loaded.flats if key.layer == layer and key.is_expert):
            for name, tensor in loaded.unit(key).items():
                assert torch.equal(tensor, getattr(experts, name)[key.expert]), (key, name)


def test_what_is_written_is_a_plain_checkpoint(method, pair, load, tmp_path):
    quantised, plain = pair(method)
    loaded = load(quantised, "fp32")
    write_checkpoint(tmp_path, loaded.model, loaded.unit, dtype="fp32", tokenizer_from=quantised)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    got = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_a_model_is_built_unquantised_whatever_its_configuration_says(method, pair):
    config = AutoConfig.from_pretrained(pair(method)[0])
    model = MoeModel.build(config, "fp32")
    assert config.quantization_config["quant_method"] == method
    assert not hasattr(model.module.config, "quantization_config") and not hasattr(model.module, "hf_quantizer")
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_no_more_than_an_expert_is_held_as_it_is_stored(method, pair, load, monkeypatch):
    sizes = []
    read = SafetensorsReader.read_bytes_into

    def noting(self: SafetensorsReader, key: str, destination: torch.Tensor, first_byte: int = 0) -> None:
        sizes.append(destination.numel())
        read(self, key, destination, first_byte)

    monkeypatch.setattr(SafetensorsReader, "read_bytes_into", noting)
    load(pair(method)[0], "fp32")
    largest = {"mxfp4": 32 * 2 * 64 // 2, "fp8": 8 * 48}[method]  # gate and up of an expert; a band of blocks
    assert max(sizes) == largest


def test_quantised_layers_that_were_not_asked_for_are_skipped(method, pair, load):
    loaded = load(pair(method)[0], "fp32", num_layers=load_config(pair(method)[0]).num_hidden_layers - 1)
    whole = load(pair(method)[1], "fp32")
    assert loaded.flats.keys() < whole.flats.keys()
    assert all(torch.equal(flat, whole.flats[key]) for key, flat in loaded.flats.items())


# --- MXFP4 -----------------------------------------------------------------------------------------------------------


def read_matrices(path: Path, tensors: dict[str, torch.Tensor], quantisation: dict, key: str) -> torch.Tensor:
    save_file(tensors, path / "f.safetensors")
    with SafetensorsReader(path / "f.safetensors") as reader:
        weights = stored_weights([reader], quantisation)
        whole = torch.full(weights.shape(key), torch.nan)
        matrices = whole.view(-1, *whole.shape[-2:])
        for number, matrix in enumerate(matrices):
            weights.read_into(key, matrix, number * matrix.numel())
    return whole


def test_every_mxfp4_byte_under_every_scale_is_exact(tmp_path):
    # One expert by scale; its 16 rows have all 256 bytes. More experts and rows would be more of the same.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(256, 1, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).repeat(1, 16, 1)
    got = read_matrices(tmp_path, {"w_blocks": blocks, "w_scales": scales}, {"quant_method": "mxfp4"}, "w_blocks")
    wanted = convert_moe_packed_tensors_fp32(blocks, scales)
    assert got.shape == wanted.shape == (256, 32, 16)
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))  # as integers: -0 is not 0
    numbers = convert_moe_packed_tensors_fp32(blocks[:1], torch.full_like(scales[:1], 127))
    exact = numbers.double() * torch.arange(-127.0, 129.0, dtype=torch.float64).exp2().view(-1, 1, 1)
    assert torch.equal(got, exact.float()) and got[252].isfinite().all() and got[255].isinf().any()


def test_mxfp4_rows_and_groups_keep_their_places(tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 300, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 300, 5), generator=generator, dtype=torch.uint8)
    got = read_matrices(tmp_path, {"w_blocks": blocks, "w_scales": scales}, {"quant_method": "mxfp4"}, "w_blocks")
    assert torch.equal(got, convert_moe_packed_tensors_fp32(blocks, scales))


# --- FP8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 24), (17, 24), (16, 25), (3, 5), (9, 31)])
def test_fp8_blocks_at_the_edges_may_be_cut_short(shape, tmp_path):
    numbers, scales = quantise_fp8(torch.randn(shape), (8, 8))
    quantisation = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    got = read_matrices(tmp_path, {"w": numbers, "w_scale_inv": scales}, quantisation, "w")
    wanted = torch.tensor(
        [[float(numbers[i, j].float() * scales[i // 8, j // 8]) for j in range(shape[1])] for i in range(shape[0])]
    )
    assert torch.equal(got, wanted)


def test_stacked_fp8_experts_have_their_own_scales(tmp_path):
    parts = [quantise_fp8(torch.randn(16, 24), (8, 8)) for _ in range(3)]
    numbers, scales = (torch.stack(part) for part in zip(*parts, strict=True))
    quantisation = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    got = read_matrices(tmp_path, {"w": numbers, "w_scale_inv": scales}, quantisation, "w")
    assert torch.equal(got, dequantised_fp8(numbers, scales))


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("block", [None, [8, 8]])
def test_one_fp8_scale_may_serve_a_whole_matrix(block, scale_shape, tmp_path):
    weight = torch.randn(200, 300)
    numbers, scale = quantise_fp8(weight, (200, 300))
    scale = scale.view(scale_shape)
    quantisation = {"quant_method": "fp8", "weight_block_size": block}
    got = read_matrices(tmp_path, {"w": numbers, "w_scale_inv": scale}, quantisation, "w")
    assert torch.equal(got, dequantised_fp8(numbers, scale))


def test_the_block_size_is_128_by_default(tmp_path):
    numbers, scales = quantise_fp8(torch.randn(256, 384), (128, 128))
    got = read_matrices(tmp_path, {"w": numbers, "w_scale_inv": scales}, {"quant_method": "fp8"}, "w")
    assert torch.equal(got, dequantised_fp8(numbers, scales))


def test_scales_of_activations_are_passed_over(load, tmp_path):
    WRITERS["fp8"](tmp_path / "static", tmp_path / "plain")
    file = tmp_path / "static" / "model-00002-of-00002.safetensors"
    name = WEIGHT["fp8"].removesuffix(".weight")
    save_file(load_file(file) | {f"{name}.activation_scale": torch.ones(())}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "static", "fp32")


def test_block_sizes_that_are_none_are_named(tmp_path):
    for block in (8, [8], [8, 0], ["a", "b"]):
        with pytest.raises(
            ValueError, match=r"weight_block_size: got .*, wanted two positive integers such as \[128, "
        ):
            stored_weights((), {"quant_method": "fp8", "weight_block_size": block})


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_other_methods_are_refused(tmp_path):
    for method in ("awq", None):
        config = tiny_config("gpt_oss").to_dict() | {"quantization_config": {"quant_method": method}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        match = (
            rf"quantization_config: got quant_method '?{method}'?, wanted one of mxfp4, fp8, or plain weights .*Take an"
        )
        with pytest.raises(ValueError, match=match):
            load_config(tmp_path)


def test_missing_scales_are_named_with_the_file_of_the_weight(method, broken, load):
    path, tensors = broken
    key, scales = WEIGHT[method] + NUMBERS[method], WEIGHT[method] + SCALES[method]
    del tensors[scales]
    save(path, tensors, SCALES[method])
    match = (
        rf"checkpoint: {key} in .*broken/model-00002-of-00002.safetensors is stored as \w+, but its scales, {scales},"
    )
    with pytest.raises(ValueError, match=match):
        load(path, "fp32")


def test_scales_without_their_weight_are_a_missing_weight(method, broken, load):
    path, tensors = broken
    del tensors[WEIGHT[method] + NUMBERS[method]]
    save(path, tensors, SCALES[method])
    with pytest.raises(ValueError, match=rf"broken lacks 1 of \d+ tensors: {WEIGHT[method]}"):
        load(path, "fp32")


def test_scales_of_another_shape_are_named_with_their_file(method, broken, load):
    path, tensors = broken
    scales = WEIGHT[method] + SCALES[method]
    shape = tuple(tensors[scales].shape)
    tensors[scales] = tensors[scales][:-1].contiguous()
    save(path, tensors, SCALES[method])
    match = rf"checkpoint: {scales} in .*model-00001-of-00002.safetensors is \w+ of shape .*, wanted .*{shape[-1]}\)"
    with pytest.raises(ValueError, match=match):
        load(path, "fp32")


def test_truncated_scales_are_named_with_their_file(method, broken, load):
    path, _ = broken
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    match = (
        rf"model-00001-of-00002.safetensors is truncated: \d+ bytes, wanted \d+; .*{SCALES[method]} is not all there"
    )
    with pytest.raises(ValueError, match=match):
        load(path, "fp32")


def test_packed_weights_of_another_shape_are_named(broken, load, method):
    path, tensors = broken
    key = WEIGHT[method] + NUMBERS[method]
    tensors[key] = torch.cat((tensors[key].view(torch.uint8),) * 2, dim=-1).view(tensors[key].dtype)
    save(path, tensors, SCALES[method])
    with pytest.raises(ValueError, match=rf"checkpoint: {key} in .*model-00002-of-00002.safetensors (is|has)"):
        load(path, "fp32")


@pytest.mark.parametrize("method", ["mxfp4"], indirect=True)
def test_packed_weights_without_groups_and_scales_of_another_dtype_are_refused(broken, load):
    path, tensors = broken
    blocks, scales = WEIGHT["mxfp4"] + "_blocks", WEIGHT["mxfp4"] + "_scales"
    save(path, tensors | {blocks: tensors[blocks].flatten(-2)}, SCALES["mxfp4"])
    with pytest.raises(
        ValueError, match=rf"{blocks} in .* is U8 of shape .*, wanted the shape \(experts, out, groups, 16"
    ):
        load(path, "fp32")
    save(path, tensors | {scales: tensors[scales].view(torch.int8)}, SCALES["mxfp4"])
    with pytest.raises(ValueError, match=rf"{scales} in .* is I8 of shape .*, wanted U8 of shape \(4, 32, 2\)"):
        load(path, "fp32")


@pytest.mark.parametrize("method", ["fp8"], indirect=True)
def test_what_has_scales_must_be_fp8(broken, load):
    path, tensors = broken
    tensors[WEIGHT["fp8"]] = tensors[WEIGHT["fp8"]].float()
    save(path, tensors, SCALES["fp8"])
    with pytest.raises(ValueError, match=rf"{WEIGHT['fp8']} in .* is F32 of shape .*, wanted F8_E4M3, since there is"):
        load(path, "fp32")


@pytest.mark.parametrize("method", ["fp8"], indirect=True)
def test_fp8_vectors_are_refused(broken, load):
    path, tensors = broken
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save(path, tensors, SCALES["fp8"])
    with pytest.raises(ValueError, match=r"model.norm.weight in .* is F8_E4M3 of shape \(32,\), wanted a matrix"):
        load(path, "fp32")


@pytest.mark.parametrize("method", ["fp8"], indirect=True)
def test_fp8_without_a_quantisation_in_config_json_is_refused(broken, load):
    path, _ = broken
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is stored as F8_E4M3, wanted one of F64, .*config.json must say how"):
        load(path, "fp32")
