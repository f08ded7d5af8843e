"""What the planner says is sent and held is what real runs send and hold, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.inference.conftest import on_devices

from isthmus.inference.engine import Engine
from isthmus.models.shards import ShardReader
from isthmus.planning.device_costs import generation_bytes, weight_bytes
from isthmus.planning.exchanges import all_gather, encoded_bytes, even_shares
from isthmus.planning.workload import device_shares, layer_ranges, passes, workload
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import CODECS, DTYPES, InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare
from isthmus.transport import codec as wire
from isthmus.transport import collectives
from isthmus.transport.base import Group
from isthmus.transport.messages import HEADER_BYTES

Checkpoint = Callable[[str], Path]
UNEVEN = (0.2, 0.45, 0.6)
PLANS = [
    InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=UNEVEN, codec=codec, algorithm=algorithm)
    for codec in CODECS
    for algorithm in ("mesh", "two_step", "scatter")
]
PLANS += [
    InferencePlan(strategy="sequence", devices=(0, 1, 2), weights=weights, codec=codec)
    for codec in CODECS
    for weights in (UNEVEN, (0.0, 1.0, 1.0))
]
PLANS += [
    InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=UNEVEN, algorithm="ring"),
    InferencePlan.even("sequence", 2),
    InferencePlan.even("single", 1),
]
PIPELINES = [
    InferencePlan(strategy="pipeline", devices=(0, 1, 2), weights=weights, codec=codec)
    for codec in CODECS
    for weights in (UNEVEN, (1.0, 1.0, 1.0))
]
PIPELINES += [InferencePlan(strategy="pipeline", devices=(0, 2), weights=(2.0, 1.0))]


def measured(directory: Path, plan: InferencePlan, request: InferenceRequest) -> list[tuple[int, int, int]]:
    """(bytes sent, exchanges, bytes of weights) of each device of the plan, for one request."""
    ids_BT = torch.randint(90, (request.batch, request.num_tokens))

    def work(group: Group) -> tuple[int, int, int] | None:
        with Engine(directory, group=group, plan=plan) as engine:
            models, before = engine.local_models, engine.stats
            if engine.is_leader:
                engine.mean(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
            else:
                engine.follow_once()
            after = engine.stats
            if not models:
                return None
            [model] = models
            if before is None or after is None:
                return 0, 0, model.num_bytes
            sent = after.bytes_sent - before.bytes_sent, after.num_exchanges - before.num_exchanges
            if not engine.is_leader:
                engine.follow()
        return (*sent, model.num_bytes)

    return [found for found in on_devices(3, work) if found is not None]


def name(plan: InferencePlan) -> str:
    return f"{plan.strategy}-{plan.algorithm}-{plan.codec}-{len(plan.devices)}-{plan.weights[0]:g}"


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("plan", PLANS, ids=name)
def test_bytes_and_exchanges_are_those_of_a_real_run(plan: InferencePlan, family: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint(family)
    request = InferenceRequest(num_tokens=11, batch=2)
    found = measured(directory, plan, request)
    predicted = workload(plan, ShardReader(directory).spec, request)
    assert tuple(sent for sent, _, _ in found) == predicted.sent_bytes()
    assert found[0][1] == predicted.num_exchanges()


@pytest.mark.parametrize("plan", PIPELINES, ids=name)
@pytest.mark.parametrize("batch", [1, 15])
def test_a_pipeline_passes_on_what_was_said(plan: InferencePlan, batch: int, checkpoint: Checkpoint) -> None:
    """15 sequences are three micro-batches."""
    directory = checkpoint("bert")
    spec = ShardReader(directory).spec
    request = InferenceRequest(num_tokens=11, batch=batch)
    found = measured(directory, plan, request)
    predicted = workload(plan, spec, request)
    assert tuple(sent for sent, _, _ in found) == predicted.sent_bytes()
    assert found[0][1] == predicted.num_exchanges()
    assert [held for _, _, held in found] == [
        weight_bytes(spec, LayerShare.whole(spec), "fp32", len(layers)) for layers in layer_ranges(plan, spec)
    ]


def test_a_pipeline_needs_a_layer_for_every_device(checkpoint: Checkpoint) -> None:
    with pytest.raises(IsthmusError, match=r"pipeline for 4 devices .* leaves one without any of the 3 layers"):
        layer_ranges(InferencePlan.even("pipeline", 4), ShardReader(checkpoint("bert")).spec)


GENERATING = [
    InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=UNEVEN),
    InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=UNEVEN, codec="int8"),
    InferencePlan.even("tensor", 2),
    InferencePlan.even("tensor", 2, codec="bf16"),
    InferencePlan.even("tensor", 4),
    InferencePlan.even("single", 1),
]


@pytest.mark.parametrize("batch", [1, 200])
@pytest.mark.parametrize("plan", GENERATING, ids=name)
def test_bytes_exchanges_and_memory_of_generating_are_those_of_a_real_run(
    plan: InferencePlan, batch: int, checkpoint: Checkpoint
) -> None:
    """A batch of 200 is too large for the exchanges that suit a few values."""
    directory = checkpoint("llama")
    spec = ShardReader(directory).spec
    requests = [InferenceRequest(num_tokens=5, batch=batch, num_new_tokens=count) for count in (3, 7)]
    ids_BT = torch.randint(3, 90, (batch, 5))

    def work(group: Group) -> tuple[list[int], list[int], list[int]]:
        with Engine(directory, group=group, plan=plan) as engine:
            stats, held = [], []
            for request in requests:
                before = engine.stats
                if engine.is_leader:
                    settings = GenerationSettings(max_new_tokens=request.num_new_tokens)
                    engine.generate_tokens(ids_BT, torch.ones_like(ids_BT), settings)
                else:
                    engine.follow_once()
                after = engine.stats
                if before is not None and after is not None:
                    stats.append((after.bytes_sent - before.bytes_sent, after.num_exchanges - before.num_exchanges))
                else:
                    stats.append((0, 0))
                [model] = engine.local_models
                slots = 2 * len(model.layers) * batch * (5 + request.num_new_tokens)
                held.append(4 * slots * model.layers[0].num_cached_heads * spec.head_size)
            if not engine.is_leader:
                engine.follow()
        return [sent for sent, _ in stats], [count for _, count in stats], held

    found = on_devices(len(plan.devices), work)
    [(_, _), (token, count)] = passes(plan, spec, requests[0])
    assert count == 2
    for rank, (sent, _, _) in enumerate(found):
        assert sent[1] - sent[0] == 4 * token.sent_bytes()[rank]
    assert found[0][1][1] - found[0][1][0] == 4 * token.num_exchanges()
    for (_, _, held), share in zip(found, device_shares(plan, spec), strict=True):
        head = 4 * len(share.vocabulary) * spec.hidden_size
        assert [generation_bytes(spec, share, request, "fp32") - head for request in requests] == held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_weights_take_what_was_said(family: str, dtype: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint(family)
    plan = InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=UNEVEN, dtype=dtype)
    found = measured(directory, plan, InferenceRequest(num_tokens=3))
    spec = ShardReader(directory).spec
    assert [held for _, _, held in found] == [
        weight_bytes(spec, share, dtype, spec.num_layers) for share in device_shares(plan, spec)
    ]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_values", [0, 1, 63, 64, 65, 1000])
def test_encoded_bytes_are_the_codecs(codec: str, num_values: int) -> None:
    assert encoded_bytes(codec, num_values) == wire.create_codec(codec).num_bytes(num_values)
    assert even_shares(num_values, 3) == collectives.even_shares(num_values, 3)


def test_every_message_has_a_header_of_the_size_that_is_counted() -> None:
    assert all_gather("fp32", [32, 32])[0][0].sent_bytes == 4 * 32 + HEADER_BYTES
