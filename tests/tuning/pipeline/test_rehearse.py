"""A process's part of a model, run without the others to be measured, is cut as in the engine and reaches all that is
the process's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tuning.pipeline.test_exactness import layers

from isthmus.models.moe_model import MoeModel, bound_parameters
from isthmus.models.skeleton import torch_dtype
from isthmus.models.tiny import FAMILIES, tiny_config
from isthmus.planning.stages import divide
from isthmus.profiling.crowding import Forgetting
from isthmus.profiling.dense import measure_dense, no_experts
from isthmus.tuning.data import keep_documents_apart
from isthmus.tuning.pipeline.pipeline import Pipeline

NUM_RANKS = 2


class Stop:
    spent_s = 0.0

    def __init__(self) -> None:
        self.passes: list[bool] = []

    def __call__(self, *, is_backward: bool = False) -> None:
        self.passes.append(is_backward)


def part_of(family: str, rank: int) -> Pipeline:
    """With its dense units bound."""
    model = MoeModel.build(tiny_config(family, **layers(family, 4)), "fp32")
    model.module.train()
    keep_documents_apart(model.module)
    place: Any = SimpleNamespace(rank=rank, size=NUM_RANKS)
    pipeline = Pipeline(model, place, divide(model.spec, num_ranks=NUM_RANKS, num_stages=4))
    for key, layout in model.held_layouts.items():
        if not key.is_expert:
            model.bind(key, torch.randn(layout.numel, dtype=torch_dtype(layout.dtype)) * 0.02)
    return pipeline


def inputs_of(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.ones(2, 8, dtype=torch.long)}
    if pipeline.model.spec.is_encoder_decoder:
        inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    return inputs


@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_reaches_what_it_reaches_in_one_graph_and_stops_at_every_layers_experts_twice(
    family: str, rank: int
) -> None:
    reached, stop = [], Stop()
    for is_cut in (False, True):
        torch.manual_seed(0)
        pipeline = part_of(family, rank)
        run = pipeline.rehearse_taped(stop) if is_cut else pipeline.rehearse
        pipeline.model.set_experts_function(no_experts)
        run(pipeline.model, inputs_of(pipeline)).backward()
        reached.append([parameter.grad is not None for parameter in bound_parameters(pipeline.model)])
    assert all(cut or not whole for whole, cut in zip(*reached, strict=True)) and any(reached[1])
    num_stops = len(set(pipeline.layers) & set(pipeline.model.moe_parts))
    assert stop.passes == [False] * num_stops + [True] * num_stops


def test_the_dense_part_can_be_measured_with_something_else_between_its_layers() -> None:
    pipeline = part_of("mixtral", 1)
    forget = Forgetting()
    seconds = measure_dense(
        pipeline.model, inputs_of(pipeline), num_tokens=16, run=pipeline.rehearse_taped(forget), interrupt=forget
    )
    assert min(seconds) > 0 and forget.spent_s > 0
