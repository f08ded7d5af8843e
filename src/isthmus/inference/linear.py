"""A matrix on a CPU in the number format that it is computed in: ``fp32``, ``bf16``, or ``int8`` weights."""

from __future__ import annotations

import ctypes
import platform
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.inference.kernels import DTYPE_NUMBERS, MOST_ROWS, CLinear, Kernels, address
from isthmus.spec.inference import DTYPES

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ROWS_AT_ONCE = 1024
_MULTIPLIES_INT8 = platform.machine() in ("x86_64", "AMD64")
"""PyTorch has fast products of 8-bit numbers here."""


class Linear(ABC):
    """x (…, in) FP32 -> x · weightᵀ + bias (…, out) FP32. ``num_bytes`` is what the weights take in memory."""

    num_bytes: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


class FloatLinear(Linear):
    """Weights and inputs in FP32, or rounded to bf16 with sums in FP32 and the result rounded once.

    Where oneDNN is there, the weights are kept in the order that its kernels read. For 8 to 64 tokens that is 1.4 to 2
    times as fast as ``F.linear``, which orders them anew in each call, and never slower.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype).contiguous()  # oneDNN takes it for that
        self.num_bytes = self._weight.nbytes
        if torch.backends.mkldnn.is_available() and weight.numel():
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        return _product(x.to(self._dtype), self._weight, self._bias).float()


class StackedLinear(Linear):
    """Matrices that each consist of ``num_groups`` groups of rows, as of queries, keys and values: the first groups of
    all of them one below the other, then the second ones, and so on."""

    def __init__(self, parts: Sequence[Linear], num_groups: int) -> None:
        self._parts, self._num_groups = tuple(parts), num_groups
        self.num_bytes = sum(part.num_bytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        found = [part(x).unflatten(-1, (self._num_groups, -1)) for part in self._parts]
        return torch.cat(found, dim=-1).flatten(-2)


class SummedLinear(Linear):
    """Matrices beside one another, each of which is multiplied with its ``widths`` of the input."""

    def __init__(self, parts: Sequence[Linear], widths: Sequence[int]) -> None:
        self._parts, self._widths = tuple(parts), list(widths)
        self.num_bytes = sum(part.num_bytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        found = [part(own) for part, own in zip(self._parts, x.split(self._widths, dim=-1), strict=True)]
        for other in found[1:]:
            found[0] += other
        return found[0]


class Int8Linear(Linear):
    """Weights of 8 bits with a scale for each output; inputs are rounded to 8 bits on the fly, with one scale for all.

    Fastest for few tokens, where reading the weights is what takes time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        largest = torch.linalg.vector_norm(weight, torch.inf, dim=1)
        scales = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
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


class RowsLinear(Linear):
    """Weights as they lie in a checkpoint, row after row: FP32, bf16, or 8 bits with a scale for each row.

    For a decoder, whose tokens mostly come one by one: ``decode.c`` reads such weights at the rate of memory,
    twice as fast as PyTorch its own order of FP32. The products of a whole prompt are PyTorch's, for FP32 a tenth
    slower than ``FloatLinear``'s.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: str, kernels: Kernels) -> None:
        self._scales: Tensor | None = None
        if dtype == "int8" and weight.numel():
            # In parts: a vocabulary's rows would for a moment take many times the memory that they are to take.
            scales, parts = zip(*map(_to_int8, weight.split(_ROWS_AT_ONCE)), strict=True)
            self._scales, weight = torch.cat(scales), torch.cat(parts)
        else:  # a device without a part of the layer has nothing to quantise
            dtype = "fp32" if dtype == "int8" else dtype
            weight = weight.to(_TORCH_DTYPES[dtype])
        self._weight, self._bias = weight.contiguous(), bias
        self._kernels = kernels
        self.num_bytes = self._weight.nbytes + (0 if self._scales is None else self._scales.nbytes)
        self.native = CLinear(
            *(address(each) for each in (self._weight, self._scales, bias)), DTYPE_NUMBERS[dtype], *weight.shape
        )

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() <= MOST_ROWS:
            return self._few(x)
        if self._scales is not None:
            return self._many_int8(x, self._scales)
        bias = None if self._bias is None else self._bias.to(self._weight.dtype)
        return _product(x.to(self._weight.dtype), self._weight, bias).float()

    def _few(self, x: Tensor) -> Tensor:
        x, batch = x.contiguous(), x.shape[:-1].numel()
        y = x.new_empty(*x.shape[:-1], len(self._weight))
        narrowed = torch.empty(x.shape, dtype=torch.int16)
        self._kernels.product(ctypes.byref(self.native), x.data_ptr(), batch, y.data_ptr(), narrowed.data_ptr())
        return y

    def _many_int8(self, x: Tensor, scales: Tensor) -> Tensor:
        if not _MULTIPLIES_INT8:
            return F.linear(x, self._weight * scales[:, None], self._bias)
        x_scales, narrow = _to_int8(x.flatten(0, -2))
        y = torch.ops.aten._int_mm(narrow, self._weight.t()).float().mul_(x_scales[:, None]).mul_(scales)
        if self._bias is not None:
            y += self._bias
        return y.unflatten(0, x.shape[:-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's, where it is there: ``F.linear`` may take another library's, and does not know its order of weights."""
    if torch.backends.mkldnn.is_available() and weight.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (n) of rows (n, m), and what they multiply."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    scales = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
    return scales, torch.div(rows, scales[:, None]).round_().to(torch.int8)


def make_linear(weight: Tensor, bias: Tensor | None, dtype: str, kernels: Kernels | None = None) -> Linear:
    """``weight`` (out, in) and ``bias`` (out) in FP32, kept as ``dtype`` says. ``kernels``: for tokens one by one.
    Raises ``ValueError`` for other dtypes."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if kernels is not None:
        return RowsLinear(weight, bias, dtype, kernels)
    if dtype == "int8" and weight.numel():
        return Int8Linear(weight, bias)
    return FloatLinear(weight, bias, _TORCH_DTYPES.get(dtype, torch.float32))
