"""Experts are measured doing what they do in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.planning.conftest import expert  # noqa: F401

from isthmus.models.expert_math import ExpertMath
from isthmus.profiling.experts import measure_expert
from isthmus.spec.model import ExpertSpec


@pytest.mark.parametrize("accumulates", [False, True])
def test_weight_gradients_are_added_where_they_will_be(
    accumulates: bool,
    expert: ExpertSpec,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[tuple[bool, ...]] = set()
    backward = ExpertMath.backward_many

    def watched(self: ExpertMath, *args: Any, accumulate: list[bool], **kwargs: Any) -> Any:
        asked.add(tuple(accumulate))
        return backward(self, *args, accumulate=accumulate, **kwargs)

    monkeypatch.setattr(ExpertMath, "backward_many", watched)
    curves = measure_expert(
        expert, torch.float32, device=torch.device("cpu"), max_tokens=8, saves=True, accumulates=accumulates
    )
    assert asked == {(accumulates,)}
    assert all(curve.num_tokens == (1, 2, 4, 8) for curve in curves)
