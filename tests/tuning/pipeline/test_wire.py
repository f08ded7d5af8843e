"""What is encoded between processes, and what is not."""

from __future__ import annotations

from math import inf

import pytest
import torch

from isthmus.transport.codec import create_codec
from isthmus.tuning.pipeline.links import Form
from isthmus.tuning.pipeline.wire import WIRES, Wire, form_of

HIDDEN_SIZE = 96
BYTES_OF_A_VALUE = {"bf16": 2.0, "int8": 66 / 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", WIRES)
def test_hidden_states_come_back_within_the_codecs_bound(codec: str, dtype: torch.dtype) -> None:
    wire = Wire(codec, HIDDEN_SIZE)
    value = torch.randn(4, 10, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(0, 1)
    message = wire.pack(value)
    assert form_of(message) == wire.message(form_of(value))
    returned = wire.unpack(message, form_of(value))
    assert form_of(returned) == form_of(value)
    rounding = 2.0**-9 * 4 if dtype == torch.bfloat16 else 0.0
    bound = create_codec(codec).error_bound(float(value.abs().max())) + rounding
    assert float((returned.float() - value.float()).abs().max()) <= bound


@pytest.mark.parametrize("codec", WIRES)
def test_an_encoded_message_is_as_small_as_its_codec_says(codec: str) -> None:
    form = Form((2, 8, HIDDEN_SIZE), torch.float32)
    message = Wire(codec, HIDDEN_SIZE).message(form)
    assert message == Form((int(2 * 8 * HIDDEN_SIZE * BYTES_OF_A_VALUE[codec]),), torch.uint8)


@pytest.mark.parametrize(
    ("codec", "form"),
    [
        (None, Form((2, 8, HIDDEN_SIZE), torch.float32)),
        ("int8", Form((16, 8), torch.float32)),  # router logits
        ("int8", Form((2, 4, 8, HIDDEN_SIZE), torch.float32)),  # a mask
        ("int8", Form((2, 8, 40), torch.float32)),
        ("int8", Form((1,), torch.int64)),
        ("bf16", Form((2, 8, HIDDEN_SIZE), torch.bfloat16)),  # would gain nothing
    ],
)
def test_what_is_no_hidden_state_or_would_gain_nothing_stays_as_it_is(codec: str | None, form: Form) -> None:
    wire = Wire(codec, HIDDEN_SIZE)
    value = torch.full(form.shape, torch.finfo(torch.float32).min if form.dtype == torch.float32 else 1.0).to(
        form.dtype
    )
    assert wire.message(form) == form
    assert wire.pack(value) is value
    assert wire.unpack(value, form) is value


@pytest.mark.parametrize("broken", [inf, torch.nan])
@pytest.mark.parametrize("codec", WIRES)
def test_what_is_not_finite_is_not_hidden(codec: str, broken: float) -> None:
    wire, value = Wire(codec, HIDDEN_SIZE), torch.zeros(1, 2, HIDDEN_SIZE)
    value[0, 1, 5] = broken
    assert not torch.isfinite(wire.unpack(wire.pack(value), form_of(value))).all()
