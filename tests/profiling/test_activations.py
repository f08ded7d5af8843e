"""What autograd saves, counted without weights, is what it saves with them."""

from __future__ import annotations

import pytest
import torch
from tests import reference

from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.models.tiny import FAMILIES, tiny_config
from isthmus.profiling.activations import count_saved_bytes, measure_saved_bytes
from isthmus.tuning.data import keep_documents_apart


def build(family: str, dtype: str) -> MoeModel:
    model = MoeModel.build(tiny_config(family), dtype)
    model.module.train()
    keep_documents_apart(model.module)
    return model


def example(family: str, *, seq_len: int, is_packed: bool) -> dict[str, torch.Tensor]:
    is_encoder_decoder = tiny_config(family).is_encoder_decoder
    steps = reference.random_steps(1, 1, vocab_size=128, seq_len=seq_len, is_encoder_decoder=is_encoder_decoder)
    inputs = dict(steps[0][0].inputs)
    if is_packed and not is_encoder_decoder:
        half = seq_len // 2
        inputs["position_ids"] = torch.cat([torch.arange(half), torch.arange(seq_len - half)]).expand(2, seq_len)
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "is_packed"), [("fp32", False), ("bf16", True)])
def test_what_is_counted_without_weights_is_what_is_measured_with_them(
    family: str, dtype: str, is_packed: bool
) -> None:
    inputs = example(family, seq_len=24, is_packed=is_packed)
    model = build(family, dtype)
    for key, layout in model.layouts.items():
        if not key.is_expert:
            model.bind(key, torch.randn(layout.numel, dtype=torch_dtype(layout.dtype)) * 0.02)
    measured = measure_saved_bytes(model, inputs)
    counted = count_saved_bytes(build(family, dtype), inputs)
    assert counted.num_bytes(range(len(counted.layers))) == measured


def test_parts_of_a_model_save_at_least_what_the_whole_does() -> None:
    counted = count_saved_bytes(build("mixtral", "fp32"), example("mixtral", seq_len=24, is_packed=True))
    whole = counted.num_bytes([0, 1])
    first, last = counted.num_bytes([0]), counted.num_bytes([1])
    # What is shared (a layer's output is the next one's input) is on both devices.
    assert max(first, last) < whole <= first + last <= 1.2 * whole
