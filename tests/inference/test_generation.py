"""Generation: any number of devices continues prompts with the very tokens that transformers gives on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.conftest import DECODERS, on_devices, reference

from isthmus.inference import model
from isthmus.inference.engine import Engine
from isthmus.inference.generation import OnTokens, check_can_generate
from isthmus.inference.kernels import load_kernels
from isthmus.models.shards import ShardReader
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan
from isthmus.transport.base import Group

Checkpoint = Callable[[str], Path]
PLANS = {
    "one": InferencePlan.even("single", 1),
    "two": InferencePlan.even("tensor", 2),
    "three uneven": InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=(0.2, 0.45, 0.6)),
    "four, more than key heads": InferencePlan.even("tensor", 4),
    "three, heads straddle": InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=(1.0, 2.0, 1.0)),
    "one without a part": InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=(1.0, 0.0, 1.0)),
}


def prompts(num_tokens: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts (2, T), the second shorter and padded on the left."""
    ids_BT = torch.randint(3, 99, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, : num_tokens // 3] = 0
    return ids_BT * mask_BT, mask_BT


def expected(
    family: str, ids_BT: torch.Tensor, mask_BT: torch.Tensor, num_new: int, end: int | None = None, **options: Any
) -> torch.Tensor:
    """transformers' new tokens (B, n)."""
    model = reference(family)
    config = model.generation_config
    assert config is not None
    config.eos_token_id = end  # pyright: ignore[reportAttributeAccessIssue]
    config.pad_token_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    options = {"do_sample": False} | options
    found: Any = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=num_new, **options)  # pyright: ignore
    return found[:, ids_BT.shape[1] :]


def generate(
    directory: Path,
    plan: InferencePlan,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    settings: GenerationSettings,
    on_tokens: OnTokens = lambda ids: False,
) -> torch.Tensor:
    """The leader's new tokens."""

    def work(group: Group) -> torch.Tensor | None:
        with Engine(directory, group=group, plan=plan) as engine:
            if engine.is_leader:
                return engine.generate_tokens(ids_BT, mask_BT, settings, on_tokens)
            engine.follow()
        return None

    found = on_devices(len(plan.devices), work)[0]
    assert found is not None
    return found


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one by what is compiled, and by PyTorch."""
    if request.param == "torch":
        monkeypatch.setattr(model, "load_kernels", lambda: None)
    elif load_kernels() is None:
        pytest.skip("there is no C compiler")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_those_of_transformers(family: str, plan: str, checkpoint: Checkpoint) -> None:
    """Mistral's window (7) is shorter than the prompt; Llama's head is not tied."""
    ids_BT, mask_BT = prompts()
    settings = GenerationSettings(max_new_tokens=128)
    found = generate(checkpoint(family), PLANS[plan], ids_BT, mask_BT, settings)
    assert found.tolist() == expected(family, ids_BT, mask_BT, 128).tolist()


@pytest.mark.parametrize(
    ("plan", "wrong"),
    [
        (InferencePlan.even("sequence", 2), "strategy: got 'sequence', wanted 'tensor'"),
        (InferencePlan.even("pipeline", 2), "strategy: got 'pipeline', wanted 'tensor'"),
        (replace(InferencePlan.even("tensor", 2), algorithm="scatter"), "algorithm: got 'scatter', wanted another"),
    ],
    ids=["sequence", "pipeline", "scatter"],
)
def test_a_plan_that_cannot_generate_is_refused(plan: InferencePlan, wrong: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(IsthmusError, match=wrong):
        check_can_generate(ShardReader(checkpoint("llama")), plan)
