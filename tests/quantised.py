"""Tiny quantised checkpoints, and what transformers' own dequantisation makes of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from isthmus.models.tiny import write_tiny_checkpoint

FP8_MAX = 448.0
BLOCK = (8, 8)
"""The size of FP8 blocks: every matrix of the tiny DeepSeek-V3 is so many whole ones, as transformers wants it."""


def pack_mxfp4(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """(E, in, out) -> blocks (E, out, G, 16) and scales (E, out, G): the nearest numbers."""
    groups = weight_EIO.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(dim=-1).clamp(min=2.0**-100).log2().ceil() - 2
    scaled = groups / exponents.exp2()[..., None]
    numbers = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(dim=-1)
    return (numbers[..., 0::2] | numbers[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def quantise_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> e4m3 numbers and the scale of each block; those at the edges may be cut short."""
    bands = [band.split(block[1], dim=1) for band in weight.float().split(block[0])]
    scales = torch.stack([torch.stack([part.abs().max() / FP8_MAX for part in band]) for band in bands])
    parts = [[part / scale for part, scale in zip(*band, strict=True)] for band in zip(bands, scales, strict=True)]
    return torch.cat([torch.cat(band, dim=1) for band in parts]).to(torch.float8_e4m3fn), scales


def dequantised_fp8(numbers: Tensor, scales: Tensor) -> Tensor:
    """By transformers, in FP32."""
    dequantise: Any = Fp8Dequantize(hf_quantizer=None)
    return dequantise.convert({"weight": [numbers], "weight_scale_inv": [scales.float()]})["weight"]


def write_mxfp4_checkpoint(path: Path, plain: Path, **overrides: Any) -> None:
    """A tiny gpt-oss at ``path`` whose experts are packed; at ``plain`` the same, dequantised by transformers."""
    # Rows are groups of 32 numbers.
    write_tiny_checkpoint("gpt_oss", plain, 0, "fp32", intermediate_size=64, **overrides)
    tensors = load_file(plain / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj")]:
        blocks, scales = pack_mxfp4(tensors.pop(key))
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": skip}
    _write(path, plain, tensors, quantisation, "_scales")
    _write_plain(plain, tensors, "_blocks", "_scales", convert_moe_packed_tensors_fp32)


def convert_moe_packed_tensors_fp32(blocks: Tensor, scales: Tensor) -> Tensor:
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def write_fp8_checkpoint(path: Path, plain: Path, **overrides: Any) -> None:
    """A tiny DeepSeek-V3 at ``path`` whose projections are FP8; at ``plain`` the same, dequantised by transformers."""
    write_tiny_checkpoint("deepseek_v3", plain, 0, "fp32", **overrides)
    tensors = load_file(plain / "model.safetensors")
    # kv_a_proj_with_mqa too; not the routers, norms and embeddings.
    for key in [key for key in tensors if re.search(r"_proj\w*\.weight$", key)]:
        tensors[key], tensors[f"{key}_scale_inv"] = quantise_fp8(tensors[key], BLOCK)
    quantisation = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(BLOCK),
    }
    _write(path, plain, tensors, quantisation, "_scale_inv")
    _write_plain(plain, tensors, "", "_scale_inv", dequantised_fp8)


WRITERS: dict[str, Callable[..., None]] = {"mxfp4": write_mxfp4_checkpoint, "fp8": write_fp8_checkpoint}


def save(path: Path, tensors: dict[str, Tensor], scales: str) -> None:
    """Two files: the first has the tensors whose names end in ``scales``, which is what they are needed with."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    file_of = {key: names[not key.endswith(scales)] for key in tensors}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if file_of[key] == name}
        save_file(part, path / name, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def _write(path: Path, plain: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any], scales: str) -> None:
    shutil.copytree(plain, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    save(path, tensors, scales)


def _write_plain(
    plain: Path, tensors: dict[str, Tensor], numbers: str, scales: str, dequantise: Callable[[Tensor, Tensor], Tensor]
) -> None:
    whole = {key: tensor for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    for key in [key for key in tensors if key.endswith(scales)]:
        whole.pop(key, None)
        name = key.removesuffix(scales)
        whole[name] = dequantise(tensors[name + numbers], tensors[key])
    save_file(whole, plain / "model.safetensors", metadata={"format": "pt"})
