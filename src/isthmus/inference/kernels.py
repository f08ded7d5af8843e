"""``decode.c`` from Python: its structures, and how tensors become them.

They hold addresses: whoever makes one keeps the tensors.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus.spec.compiling import load

DTYPE_NUMBERS = {"fp32": 0, "bf16": 1, "int8": 2}
NORMS = {"rms": 0, "layer": 1}
ACTIVATIONS = {
    **{"silu": 0, "swish": 0, "gelu": 1, "relu": 3},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), 2),
}
MOST_ROWS = 4
"""Of so many tokens at once a product is faster here than PyTorch's, which is made for more."""


class CLinear(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("dtype", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
    ]


class CNorm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class CLayer(ctypes.Structure):
    _fields_ = [
        *[(name, CLinear) for name in ("qkv", "o", "up", "down")],
        *[(name, CNorm) for name in ("norm1", "norm2")],
        *[(name, c_void_p) for name in ("q_norm", "k_norm", "o_bias", "down_bias")],
    ]


class CShape(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("hidden", "heads", "kv_heads", "cached_heads", "head_size", "columns")],
        *[(name, c_int64) for name in ("norm", "activation", "has_gate")],
        ("kv_of_cached", c_void_p),
        ("epsilon", c_float),
    ]


class CToken(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("batch", "capacity", "slot", "used")],
        *[(name, c_void_p) for name in ("positions", "cos", "sin", "mask", "scratch", "narrowed")],
    ]


class Kernels:
    """The functions of ``decode.c``, typed. Pointers to floats are addresses (``Tensor.data_ptr``)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.product = _typed(library.product, POINTER(CLinear), c_void_p, c_int64, c_void_p, c_void_p)
        blocks = (POINTER(CShape), POINTER(CLayer), POINTER(CToken))
        self.attention = _typed(library.attention, *blocks, c_void_p, c_void_p, c_void_p, c_int)
        self.mlp = _typed(library.mlp, *blocks, c_void_p, c_void_p, c_int)


def load_kernels() -> Kernels | None:
    """None where they cannot be had (``compiling.load``)."""
    library = load(Path(__file__).with_name("decode.c"))
    return None if library is None else Kernels(library)


def address(tensor: Tensor | None) -> int | None:
    """Of a contiguous tensor's first element."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _typed(function: Any, *types: Any) -> Any:
    function.argtypes, function.restype = types, None
    return function
