"""What a wave takes beside its experts is measured with the engine's own passes, whose experts need no memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from isthmus.models.moe_model import MoeModel
from isthmus.models.tiny import tiny_config
from isthmus.profiling.experts import LayersExperts
from isthmus.tuning.wave_times import measure_routing


class Counting:
    spent_s = 0.0

    def __init__(self) -> None:
        self.passes: list[bool] = []

    def __call__(self, *, is_backward: bool = False) -> None:
        self.passes.append(is_backward)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "switch_transformers"])
def test_both_passes_are_measured_and_something_else_comes_where_experts_would_compute(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MoeModel.build(tiny_config(family), "fp32")
    layer, parts = next(iter(model.moe_parts.items()))
    monkeypatch.setattr("isthmus.profiling.crowding.REPEATS", 3)
    interrupt = Counting()
    curves = measure_routing(
        parts.spec,
        model.experts[layer],
        torch.float32,
        device=torch.device("cpu"),
        max_tokens=300,
        interrupt=interrupt,
    )
    for curve in curves:
        assert curve.seconds[0] > 0 and all(few <= more for few, more in pairwise(curve.seconds))
    # One wave to warm up and three that count, each interrupted where it computes, and the three before they begin.
    num_sizes = len(curves[0].num_tokens)
    assert interrupt.passes.count(True) == 4 * num_sizes
    assert interrupt.passes.count(False) == (4 + 3 + 3) * num_sizes


def test_experts_that_come_between_compute_in_the_pass_that_is_named() -> None:
    model = MoeModel.build(tiny_config("mixtral"), "fp32")
    layer, parts = next(iter(model.moe_parts.items()))
    experts = LayersExperts(
        parts.spec, torch.float32, num_tokens=16, saves=True, activation_module=model.experts[layer]
    )
    done: list[str] = []
    experts._passes = (lambda: done.append("forward"), lambda: done.append("backward"))
    experts()
    experts(is_backward=True)
    assert done == ["forward"] * parts.spec.num_experts + ["backward"] * parts.spec.num_experts
    assert experts.spent_s > 0
