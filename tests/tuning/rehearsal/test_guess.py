"""What a policy is told in a rehearsal, and that it takes the time of the runtime's predictor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from isthmus.models.tiny import tiny_config
from isthmus.spec.model import ModelSpec
from isthmus.tuning.predictor import PopularityPredictor
from isthmus.tuning.preflight.blueprint import blueprint_of, packed_inputs
from isthmus.tuning.rehearsal.guess import PREDICTED_SHARE, Guess

COUNTS = {0: [8, 4, 0, 4], 1: [16, 0, 0, 0]}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    config = tiny_config("mixtral", num_hidden_layers=2)
    return blueprint_of(config, "fp32", packed_inputs(config, 1, 8)).spec


@pytest.mark.parametrize("takes_time", [False, True])
def test_counts_are_right_for_a_share_of_the_tokens(takes_time: bool, spec: ModelSpec) -> None:
    before = torch.get_rng_state()
    guess = Guess(spec, torch.float32, takes_time=takes_time)
    guess.expect(COUNTS, 8)
    even = 4 * (1 - PREDICTED_SHARE)
    assert guess.predict(1, None) == [round(16 * PREDICTED_SHARE + even), *(3 * [round(even)])]
    assert torch.equal(torch.get_rng_state(), before)  # a run that plans first draws what it drew


@pytest.mark.parametrize("takes_time", [False, True])
def test_the_runtimes_predictor_works_beside_on_as_many_tokens(
    takes_time: bool, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, int, int]] = []

    def note(name: str) -> None:
        whole: Callable[..., Any] = getattr(PopularityPredictor, name)

        def noted(self: PopularityPredictor, layer: int, rows: torch.Tensor) -> Any:
            called.append((name, layer, len(rows)))
            return whole(self, layer, rows)

        monkeypatch.setattr(PopularityPredictor, name, noted)

    note("predict")
    note("learn")
    guess = Guess(spec, torch.bfloat16, takes_time=takes_time)
    for num_tokens in (8, 24):
        guess.expect(COUNTS, num_tokens)
        guess.predict(1, None)
        guess.learn(1, None)
    wanted = [("predict", 1, 8), ("learn", 1, 8), ("predict", 1, 24), ("learn", 1, 24)]
    assert called == (wanted if takes_time else [])
