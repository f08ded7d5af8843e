"""The engine: one device is asked, all compute, and the answer is what transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.inference.conftest import add_tokenizer, on_devices, reference

from isthmus.inference.engine import Engine
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan
from isthmus.transport.base import Group

Checkpoint = Callable[[str], Path]
TEXTS = ["one two three", "four", "five six seven one two three four five", ""]
PLANS = {
    "single": InferencePlan.even("single", 1),
    "tensor": InferencePlan.even("tensor", 3),
    "sequence": InferencePlan(strategy="sequence", devices=(0, 1, 2), weights=(0.2, 0.45, 0.6)),
    "scatter": InferencePlan(strategy="tensor", devices=(0, 1, 2), weights=(0.2, 0.45, 0.6), algorithm="scatter"),
    "pipeline": InferencePlan(strategy="pipeline", devices=(0, 1, 2), weights=(0.2, 0.45, 0.6)),
    "two of three": InferencePlan.even("sequence", 2),
}


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Path:
    return add_tokenizer(checkpoint("bert"))


def ask(model: Path, plan: InferencePlan, question: Callable[[Engine], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What the leader of three devices answers."""

    def work(group: Group) -> list[torch.Tensor] | None:
        with Engine(model, group=group, plan=plan) as engine:
            if engine.is_leader:
                return question(engine)
            engine.follow()
        return None

    answers = on_devices(3, work)
    assert answers[1:] == [None, None]
    assert answers[0] is not None
    return answers[0]


def plain_hidden(engine: Engine, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return reference("bert")(**engine.tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
@pytest.mark.parametrize("plan", PLANS)
def test_texts_get_the_vectors_of_plain_transformers(plan: str, pooling: str, model: Path) -> None:
    found = ask(model, PLANS[plan], lambda engine: engine.embed(TEXTS, pooling=pooling, batch_size=3))
    engine = Engine(model)
    for text, vector in zip(TEXTS, found, strict=True):
        hidden_TH = plain_hidden(engine, text)
        wanted = {"mean": hidden_TH.mean(dim=0), "cls": hidden_TH[0], "tokens": hidden_TH}[pooling]
        torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-5)


def test_normalized_vectors_have_length_one(model: Path) -> None:
    for vector in Engine(model).embed(TEXTS, normalize=True):
        torch.testing.assert_close(vector.norm(), torch.tensor(1.0))


def test_a_text_that_is_too_long_is_refused_and_the_next_is_served(model: Path) -> None:
    def question(engine: Engine) -> list[torch.Tensor]:
        with pytest.raises(IsthmusError, match=r"text: 602 tokens, and bert at .* allows 512"):
            engine.embed(["one " * 600])
        return engine.embed(["one"])

    assert len(ask(model, PLANS["tensor"], question)) == 1


def test_only_the_leader_is_asked(model: Path) -> None:
    def work(group: Group) -> None:
        with Engine(model, group=group, plan=PLANS["tensor"]) as engine:
            if group.rank == 1:
                with pytest.raises(IsthmusError, match="only rank 0 is asked"):
                    engine.embed(["one"])
            if not engine.is_leader:
                engine.follow()

    on_devices(3, work)


def test_plans_that_no_group_can_follow_are_refused(model: Path) -> None:
    with pytest.raises(IsthmusError, match=r"got ranks \(0, 1\) in the plan for 1, wanted 0 among them"):
        Engine(model, plan=InferencePlan.even("tensor", 2))
    with pytest.raises(IsthmusError, match="pooling: got 'max', wanted one of mean, cls, tokens"):
        Engine(model).embed(["one"], pooling="max")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "magic"}, "strategy: got 'magic', wanted one of single, tensor, sequence"),
        ({"devices": (1, 0)}, "ascending ranks"),
        ({"weights": (1.0,)}, "weights: got 1, wanted 2"),
        ({"strategy": "single"}, "for strategy 'single', wanted one"),
    ],
)
def test_plans_say_what_is_wrong(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferencePlan(**{"strategy": "tensor", "devices": (0, 1), "weights": (1.0, 1.0), **fields})
