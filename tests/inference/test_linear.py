"""Every way of keeping a matrix multiplies like the matrix, within what its numbers can hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from isthmus.inference.kernels import MOST_ROWS, Kernels, load_kernels
from isthmus.inference.linear import RowsLinear, StackedLinear, SummedLinear, make_linear

TOLERANCES = {"fp32": 1e-6, "bf16": 1e-2, "int8": 2e-2}
"""Of the largest output; bf16's and int8's are what rounding weights and inputs to 8 bits takes."""
SHAPES = [(5, 67), (64, 128), (1, 1), (130, 200), (0, 16), (7, 0)]


@pytest.fixture(params=[True, False], ids=["rows", "packed"])
def kernels(request: pytest.FixtureRequest) -> Kernels | None:
    if not request.param:
        return None
    found = load_kernels()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_products_of_few_and_of_many_tokens(
    kernels: Kernels | None, dtype: str, shape: tuple[int, int], has_bias: bool
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0]) if has_bias else None
    linear = make_linear(weight, bias, dtype, kernels)
    for lead in [(1,), (1, 1), (MOST_ROWS,), (MOST_ROWS + 1,), (2, 9), (3, 16)]:
        x = torch.randn(*lead, shape[1])
        found, wanted = linear(x), F.linear(x, weight, bias)
        assert found.shape == wanted.shape and found.dtype == torch.float32
        if wanted.numel():
            scale = max(float(wanted.abs().max()), float(x.norm(dim=-1).max()), 1.0)
            assert float((found - wanted).abs().max()) <= TOLERANCES[dtype] * scale


def test_a_token_by_itself_is_rounded_less_than_its_weights(kernels: Kernels | None) -> None:
    """8-bit weights times an input of 14 bits: what is left is the error of the weights."""
    if kernels is None:
        pytest.skip("only the kernels keep 14 bits")
    torch.manual_seed(0)
    weight, x = torch.randn(40, 768), torch.randn(1, 768)
    scales = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scales).round() * scales
    linear = make_linear(weight, None, "int8", kernels)
    assert isinstance(linear, RowsLinear)
    torch.testing.assert_close(linear(x), F.linear(x, rounded), rtol=0, atol=1e-3 * float(x.norm()))


def test_many_products_without_those_of_8_bits_are_of_the_same_weights(
    kernels: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 96), torch.randn(40), torch.randn(2, 20, 96)
    linear = make_linear(weight, bias, "int8", kernels)
    monkeypatch.setattr("isthmus.inference.linear._MULTIPLIES_INT8", False)
    torch.testing.assert_close(linear(x), F.linear(x, weight, bias), rtol=0, atol=0.05 * float(x.norm(dim=-1).max()))


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("sizes", [(2, 5, 1), (4,), (3, 3)], ids=str)
def test_matrices_in_parts_multiply_like_the_whole(sizes: tuple[int, ...], num_groups: int) -> None:
    """Each group of rows is divided alike; and the columns of what reads them."""
    torch.manual_seed(0)
    total, x = sum(sizes), torch.randn(2, 9, 16)
    up, down, bias = torch.randn(num_groups, total, 16), torch.randn(16, total), torch.randn(num_groups, total)
    ups = [
        make_linear(part.flatten(0, 1), part_bias.flatten(), "fp32", None)
        for part, part_bias in zip(up.split(sizes, 1), bias.split(sizes, 1), strict=True)
    ]
    stacked = StackedLinear(ups, num_groups)
    summed = SummedLinear([make_linear(part, None, "fp32", None) for part in down.split(sizes, 1)], sizes)
    torch.testing.assert_close(stacked(x), F.linear(x, up.flatten(0, 1), bias.flatten()), rtol=1e-5, atol=1e-5)
    y = torch.randn(2, 9, total)
    torch.testing.assert_close(summed(y), F.linear(y, down), rtol=1e-5, atol=1e-5)
    assert stacked.num_bytes == up.nbytes and summed.num_bytes == down.nbytes


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_weights_take_the_bytes_that_are_told(kernels: Kernels | None, dtype: str) -> None:
    linear = make_linear(torch.randn(64, 128), None, dtype, kernels)
    assert linear.num_bytes == {"fp32": 4, "bf16": 2, "int8": 1}[dtype] * 64 * 128 + (4 * 64 if dtype == "int8" else 0)


def test_an_unknown_dtype_is_refused(kernels: Kernels | None) -> None:
    with pytest.raises(ValueError, match="dtype: got 'fp4', wanted one of fp32"):
        make_linear(torch.randn(2, 2), None, "fp4", kernels)
