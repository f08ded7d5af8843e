"""Every way of dividing a forward pass gives what transformers computes on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.inference.conftest import CONFIGS, DECODERS, on_devices, reference

from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.inference.strategies.pipeline import Pipeline
from isthmus.inference.strategies.scattered_tensor import ScatteredTensorParallel
from isthmus.inference.strategies.sequence_parallel import SequenceParallel
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.models.shards import ShardReader
from isthmus.planning import shares
from isthmus.planning.shares import divide, divide_layer
from isthmus.spec.transformer import LayerShare, Range
from isthmus.transport.base import Algorithm, Group

Checkpoint = Callable[[str], Path]
NUM_TOKENS = 13
UNEVEN = (0.2, 0.45, 0.6)


def batch(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (2, T): the second sequence is shorter, padded as the family's users do."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 99, (2, NUM_TOKENS), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, slice(0, 4) if family in DECODERS else slice(9, NUM_TOKENS)] = 0
    padding = CONFIGS[family]().pad_token_id
    return ids_BT.masked_fill(mask_BT == 0, padding or 0), mask_BT


def expected(family: str, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """transformers' hidden states after the last norm, (B, T, H)."""
    model = reference(family)
    is_decoder = family in DECODERS
    positions = {"position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)} if is_decoder else {}
    with torch.inference_mode():
        return model.base_model(input_ids=ids_BT, attention_mask=mask_BT, **positions).last_hidden_state


def run(
    family: str, checkpoint: Checkpoint, num_devices: int, make: Callable[[ShardReader, Group], Strategy]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states put together from all devices, expected), padding left out."""
    ids_BT, mask_BT = batch(family)
    directory = checkpoint(family)

    def work(group: Group) -> tuple[int, torch.Tensor]:
        strategy = make(ShardReader(directory), group)
        hidden = strategy.run(Tokens.of(ids_BT, mask_BT, is_decoder=family in DECODERS))
        ranges = strategy.token_ranges(NUM_TOKENS)
        held = ranges[group.rank] if ranges is not None else Range(start=0, stop=NUM_TOKENS)
        assert hidden.shape[1] == len(held)
        return held.start, hidden

    parts = on_devices(num_devices, work)
    if parts[0][1].shape[1] == NUM_TOKENS:
        for _, other in parts[1:]:
            assert torch.equal(other, parts[0][1]), "devices disagree"
        parts = parts[:1]
    hidden_BTH = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])], dim=1)
    is_real = mask_BT.bool()
    return hidden_BTH[is_real], expected(family, ids_BT, mask_BT)[is_real]


def assert_equal(pair: tuple[torch.Tensor, torch.Tensor], tolerance: float = 1e-5) -> None:
    got, wanted = pair
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def alone(reader: ShardReader, group: Group, dtype: str = "fp32") -> Strategy:
    return TensorParallel(LocalModel(reader, LayerShare.whole(reader.spec), dtype), None)


def tensor_parallel(
    weights: tuple[float, ...], codec: str | None = None, algorithm: Algorithm = "two_step"
) -> Callable[[ShardReader, Group], Strategy]:
    def make(reader: ShardReader, group: Group) -> Strategy:
        share = divide_layer(reader.spec, weights, column_unit=1)[group.rank]
        return TensorParallel(LocalModel(reader, share, "fp32"), group, codec=codec, algorithm=algorithm)

    return make


def sequence_parallel(weights: tuple[float, ...], codec: str | None = None) -> Callable[[ShardReader, Group], Strategy]:
    def make(reader: ShardReader, group: Group) -> Strategy:
        model = LocalModel(reader, LayerShare.whole(reader.spec), "fp32")
        return SequenceParallel(model, group, weights=weights, codec=codec)

    return make


def scattered(weights: tuple[float, ...], codec: str | None = None) -> Callable[[ShardReader, Group], Strategy]:
    def make(reader: ShardReader, group: Group) -> Strategy:
        share = divide_layer(reader.spec, weights, column_unit=1)[group.rank]
        return ScatteredTensorParallel(LocalModel(reader, share, "fp32"), group, weights=weights, codec=codec)

    return make


def pipeline(weights: tuple[float, ...], codec: str | None = None) -> Callable[[ShardReader, Group], Strategy]:
    def make(reader: ShardReader, group: Group) -> Strategy:
        layers = divide(reader.spec.num_layers, weights)[group.rank]
        model = LocalModel(reader, LayerShare.whole(reader.spec), "fp32", layer_range=layers)
        return Pipeline(model, group, codec=codec)

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_one_device_is_plain_transformers(family: str, checkpoint: Checkpoint) -> None:
    assert_equal(run(family, checkpoint, 1, alone))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("int8", 0.12)])
def test_narrow_weights_stay_near(dtype: str, tolerance: float, checkpoint: Checkpoint) -> None:
    for family in CONFIGS:
        assert_equal(run(family, checkpoint, 1, lambda reader, group: alone(reader, group, dtype)), tolerance)


@pytest.mark.parametrize("weights", [(1.0, 1.0), UNEVEN, (1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_heads_and_columns_divided(family: str, weights: tuple[float, ...], checkpoint: Checkpoint) -> None:
    """Four devices are more than the two key/value heads of the decoders; one of weight 0 computes nothing."""
    assert_equal(run(family, checkpoint, len(weights), tensor_parallel(weights)))


@pytest.mark.parametrize("weights", [(1.0, 1.0), UNEVEN, (0.0, 1.0, 0.05, 1.0)], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_divided(family: str, weights: tuple[float, ...], checkpoint: Checkpoint) -> None:
    """A device of weight 0 computes nothing and is still there."""
    assert_equal(run(family, checkpoint, len(weights), sequence_parallel(weights)))


@pytest.mark.parametrize("weights", [(1.0, 1.0), UNEVEN, (0.0, 1.0, 0.05, 1.0)], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_heads_and_columns_divided_and_what_lies_between_by_tokens(
    family: str, weights: tuple[float, ...], checkpoint: Checkpoint
) -> None:
    assert_equal(run(family, checkpoint, len(weights), scattered(weights)))


@pytest.mark.parametrize("micro_batch_tokens", [1, 64], ids=["two micro-batches", "one"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), UNEVEN], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_layers_divided(
    family: str,
    weights: tuple[float, ...],
    micro_batch_tokens: int,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shares, "_MICRO_BATCH_TOKENS", micro_batch_tokens)
    assert_equal(run(family, checkpoint, len(weights), pipeline(weights)))


def test_a_pipeline_keeps_the_order_of_many_micro_batches(checkpoint: Checkpoint) -> None:
    directory = checkpoint("bert")
    ids_BT = torch.randint(3, 99, (40, 32), generator=torch.Generator().manual_seed(2))
    tokens = Tokens.of(ids_BT)
    parts = on_devices(3, lambda group: pipeline(UNEVEN)(ShardReader(directory), group).run(tokens))
    whole = alone(ShardReader(directory), None).run(tokens)  # pyright: ignore[reportArgumentType]
    assert [part.shape[1] for part in parts] == [0, 0, 32]
    assert_equal((parts[2], whole))


@pytest.mark.parametrize("algorithm", ["mesh", "two_step", "ring"])
def test_every_all_reduce(algorithm: Algorithm, checkpoint: Checkpoint) -> None:
    assert_equal(run("llama", checkpoint, 3, tensor_parallel(UNEVEN, algorithm=algorithm)))


@pytest.mark.parametrize("make", [tensor_parallel, sequence_parallel, scattered, pipeline])
@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.05), ("int4", 0.6)])
def test_codecs_stay_near(make: Callable, codec: str, tolerance: float, checkpoint: Checkpoint) -> None:
    assert_equal(run("bert", checkpoint, 3, make(UNEVEN, codec=codec)), tolerance)
