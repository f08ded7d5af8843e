"""Codecs against their stated bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.transport.codec import BLOCK_VALUES, CODEC_NAMES, Codec, create_codec

every_codec = pytest.mark.parametrize("name", CODEC_NAMES)
block_codecs = pytest.mark.parametrize("name", ["int8", "int4"])
FLOAT32_TINY = 2.0**-126


def there_and_back(codec: Codec, values_V: Tensor) -> Tensor:
    # What is beyond the buffers must stay as it is.
    num_bytes = codec.num_bytes(values_V.numel())
    encoded, decoded_V = torch.full((num_bytes + 8,), 77, dtype=torch.uint8), torch.full((values_V.numel() + 8,), 7.0)
    codec.encode(values_V, encoded[:num_bytes])
    codec.decode(encoded[:num_bytes], decoded_V[: values_V.numel()])
    assert (encoded[num_bytes:] == 77).all() and (decoded_V[values_V.numel() :] == 7).all()
    return decoded_V[: values_V.numel()]


def largest_that_counts(name: str, values_V: Tensor) -> list[float]:
    """For each value what ``error_bound`` takes: its own size, or the largest in its block."""
    sizes_V = values_V.abs().double()
    if name in ("int8", "int4"):
        for block in sizes_V.split(BLOCK_VALUES) if len(sizes_V) else ():
            block.fill_(block.max())
    return sizes_V.tolist()


def assert_within_bound(codec: Codec, values_V: Tensor) -> None:
    errors = (there_and_back(codec, values_V).double() - values_V.double()).abs().tolist()
    for error, largest in zip(errors, largest_that_counts(codec.name, values_V), strict=True):
        assert error <= codec.error_bound(largest), (error, largest)


@every_codec
@given(
    values=st.integers(0, 200).flatmap(
        lambda numel: arrays("float32", numel, elements=st.floats(-1.5 * 2**126, 1.5 * 2**126, width=32))
    )
)
@example(values=torch.tensor([1.5 * 2.0**126, -1.5 * 2.0**126, 1.0]).numpy())
@example(values=torch.tensor([2.0**-149, -(2.0**-130), FLOAT32_TINY, 0.0, -0.0]).numpy())
def test_no_value_is_further_off_than_the_bound(name: str, values) -> None:
    assert_within_bound(create_codec(name), torch.from_numpy(values.copy()))


@every_codec
@pytest.mark.parametrize("exponent", [-149, -127, -119, -40, 0, 40, 125])
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4096, 64 * 1024 * 2 + 5])
def test_bound_holds_at_every_scale_and_length(name: str, exponent: int, numel: int) -> None:
    values_V = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).clamp(-3.9, 3.9) / 2
    values_V = values_V * 2.0 ** (exponent / 2) * 2.0 ** (exponent / 2)
    codec = create_codec(name)
    assert_within_bound(codec, values_V) if numel < 5000 else None
    largest = values_V.abs().max().item()
    assert (there_and_back(codec, values_V) - values_V).abs().max().item() <= codec.error_bound(largest)


@block_codecs
def test_the_largest_value_keeps_its_sign_whichever_way_its_scale_is_rounded(name: str) -> None:
    codec = create_codec(name)
    for step in range(1, 1025):
        values_V = torch.full((64,), 1 + step / 1024)
        values_V[::2] *= -1
        assert_within_bound(codec, values_V)


@block_codecs
def test_bound_is_about_half_a_step(name: str) -> None:
    codec = create_codec(name)
    levels = {"int8": 127, "int4": 7}[name]
    assert 0.5 / levels < codec.error_bound(1.0) < 0.52 / levels
    values_V = torch.linspace(-1, 1, 64 * 50).view(50, 64).t().contiguous()
    worst = (there_and_back(codec, values_V.view(-1)) - values_V.view(-1)).abs().max().item()
    assert worst > 0.8 * codec.error_bound(1.0), "a bound that nothing comes near says nothing"


@every_codec
def test_zeros_stay_zeros(name: str) -> None:
    assert (there_and_back(create_codec(name), torch.zeros(130)) == 0).all()


@block_codecs
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 2.0**127, -3.4e38])
def test_a_block_with_what_cannot_be_encoded_decodes_to_nan_and_no_other_does(name: str, bad: float) -> None:
    values_V = torch.randn(64 * 3 + 10)
    values_V[70] = bad
    decoded_V = there_and_back(create_codec(name), values_V)
    assert decoded_V[64:128].isnan().all()
    assert decoded_V[:64].isfinite().all() and decoded_V[128:].isfinite().all()
    values_V[-1] = bad
    decoded_V = there_and_back(create_codec(name), values_V)
    assert decoded_V[192:].isnan().all() and decoded_V[128:192].isfinite().all()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_fp32_and_bf16_carry_what_is_not_finite(name: str) -> None:
    decoded_V = there_and_back(create_codec(name), torch.tensor([math.inf, -math.inf, math.nan, 1.0]))
    assert decoded_V.tolist()[:2] == [math.inf, -math.inf] and decoded_V[2].isnan() and decoded_V[3] == 1


@every_codec
def test_bytes_per_value_are_what_the_name_promises(name: str) -> None:
    bits = {"fp32": 32, "bf16": 16, "int8": 8.25, "int4": 4.25}[name]
    codec = create_codec(name)
    assert codec.num_bytes(64 * 100) * 8 == bits * 64 * 100
    assert codec.num_bytes(0) == 0 and codec.num_bytes(1) <= 66


@every_codec
def test_decoding_needs_nothing_of_who_encoded(name: str) -> None:
    """A codec that has only ever decoded gives the same bits as the one that encoded, whatever either did before."""
    values_V = torch.randn(3 * 64 + 1)
    codec, other = create_codec(name), create_codec(name)
    there_and_back(codec, torch.randn(64 * 3000))
    encoded = torch.empty(codec.num_bytes(len(values_V)), dtype=torch.uint8)
    codec.encode(values_V, encoded)
    ours_V, theirs_V = torch.empty(len(values_V)), torch.empty(len(values_V))
    other.decode(encoded, theirs_V)
    codec.decode(encoded, ours_V)
    assert torch.equal(ours_V, theirs_V)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(IsthmusError, match="codec: got 'zip', wanted one of fp32, bf16, int8, int4"):
        create_codec("zip")
    codec = create_codec("int8")
    with pytest.raises(IsthmusError, match=r"values_V is torch.bfloat16, wanted torch.float32"):
        codec.encode(torch.zeros(64, dtype=torch.bfloat16), torch.zeros(66, dtype=torch.uint8))
    with pytest.raises(IsthmusError, match=r"64 values need 66 bytes \(torch.uint8\), got 65"):
        codec.decode(torch.zeros(65, dtype=torch.uint8), torch.zeros(64))
