"""A matrix on a CPU in the number format that it is computed in: ``fp32``, ``bf16``, or ``int8`` weights."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = ("fp32", "bf16", "int8")


class Linear(ABC):
    """x (…, in) FP32 -> x · weightᵀ + bias (…, out) FP32. ``num_bytes`` is what the weights take in memory."""

    num_bytes: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


class Fp32Linear(Linear):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.num_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Bf16Linear(Linear):
    """Inputs are rounded to bf16 too; sums are FP32, the result is rounded to bf16 once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.bfloat16()
        self.bias = None if bias is None else bias.bfloat16()
        self.num_bytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).float()


class Int8Linear(Linear):
    """Weights of 8 bits with a scale for each output; inputs are rounded to 8 bits on the fly, with one scale for all.

    Fastest for few tokens, where reading the weights is what takes time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # PyTorch 2.13 deprecates making such a tensor and still has no other way to these kernels, which are two to
            # four times as fast as its own for bf16 or for 8-bit weights with bf16 inputs.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantised, bias)
        self.num_bytes = weight.numel() + scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self._packed, False)


_KINDS: dict[str, type[Fp32Linear | Bf16Linear | Int8Linear]] = {
    "fp32": Fp32Linear,
    "bf16": Bf16Linear,
    "int8": Int8Linear,
}


def make_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> Linear:
    """``weight`` (out, in) and ``bias`` (out) in FP32, kept as ``dtype`` says. Raises ``ValueError`` for others."""
    if dtype not in _KINDS:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    return _KINDS[dtype](weight, bias)
