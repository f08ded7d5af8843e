"""Several plans that stay loaded: whichever answers a request, the answer is the same; and devices that are lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.inference.conftest import on_devices

from isthmus.inference.engine import Engine
from isthmus.inference.layer import Layer
from isthmus.inference.runtime_planner import Answer, RuntimePlanner
from isthmus.inference.session import Arrangement
from isthmus.planning.pieces import Piece, held_bytes, pieces_on, resident_bytes
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.transport.base import Group

Checkpoint = Callable[[str], Path]
IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
ATTENDED = torch.ones_like(IDS, dtype=torch.bool)


def plan(strategy: str, *devices: int, **options: Any) -> InferencePlan:
    return InferencePlan(strategy=strategy, devices=devices, weights=(1.0,) * len(devices), **options)


class Turns:
    """A planner that takes each plan in turn, and keeps what it is told."""

    def __init__(self, num_plans: int) -> None:
        self.num_plans = num_plans
        self.asked: list[InferenceRequest] = []
        self.observed: list[Sequence[Sequence[float]]] = []
        self.answers: list[Answer] = []

    def observe(self, rates_NN: Sequence[Sequence[float]], answer: Answer | None) -> None:
        self.observed.append(rates_NN)
        if answer is not None:
            self.answers.append(answer)

    def choose(self, request: InferenceRequest) -> int:
        self.asked.append(request)
        return (len(self.asked) - 1) % self.num_plans

    def gives_back(self, request: InferenceRequest, number: int) -> bool:
        return number == 0


PLANS = (
    plan("tensor", 0, 1, 2),
    plan("sequence", 0, 2),
    plan("single", 0),
    plan("pipeline", 0, 1),
    plan("tensor", 0, 1, codec="bf16"),
)


def test_whichever_plan_answers_the_answer_is_the_same(checkpoint: Checkpoint) -> None:
    model = checkpoint("bert")
    wanted = Engine(model).hidden(IDS, ATTENDED)
    planner = Turns(len(PLANS))

    def work(group: Group) -> list[InferencePlan]:
        chooses = cast(RuntimePlanner, planner) if group.rank == 0 else None
        arranged = Arrangement(group=group, plans=PLANS, planner=chooses)
        used = []
        with Engine(model, arranged=arranged) as engine:
            if not engine.is_leader:
                engine.follow()
                return []
            for _ in range(2 * len(PLANS)):
                found = engine.hidden(IDS, ATTENDED)
                tolerance = 0.05 if engine.plan.codec == "bf16" else 1e-4
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
                used.append(engine.plan)
        return used

    used, *_ = on_devices(3, work)
    assert used == [*PLANS, *PLANS]
    assert planner.asked == [InferenceRequest(num_tokens=11, batch=2)] * len(used)
    assert [(answer.request, answer.number) for answer in planner.answers] == [
        (request, number % len(PLANS)) for number, request in enumerate(planner.asked[:-1])
    ]
    assert all(answer.seconds > 0 for answer in planner.answers)


def test_without_a_planner_it_is_the_first(checkpoint: Checkpoint) -> None:
    def work(group: Group) -> InferencePlan | None:
        with Engine(checkpoint("bert"), arranged=Arrangement(group=group, plans=PLANS)) as engine:
            if engine.is_leader:
                engine.mean(IDS, ATTENDED)
                return engine.plan
            engine.follow()
        return None

    assert on_devices(3, work)[0] == PLANS[0]


def test_what_plans_share_is_held_once(checkpoint: Checkpoint) -> None:
    plans = (plan("sequence", 0, 1), plan("single", 0), plan("pipeline", 0, 1), plan("tensor", 0, 1))
    known: list[dict[Piece, Layer]] = [{}, {}]

    def work(group: Group) -> int:
        with Engine(
            checkpoint("llama"), arranged=Arrangement(group=group, plans=plans), known=known[group.rank]
        ) as engine:
            spec = engine.spec
            wanted = pieces_on(group.rank, plans, spec)
            assert known[group.rank].keys() == wanted
            assert sum(layer.num_bytes for layer in known[group.rank].values()) == held_bytes(spec, wanted)
            if not engine.is_leader:
                engine.follow()
            return len(wanted)

    assert on_devices(2, work) == [3 + 3, 3 + 3]  # whole layers, and half ones


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_parts_that_plans_share_are_read_once_and_compute_the_whole(checkpoint: Checkpoint, dtype: str) -> None:
    """Every device has all layers whole under one plan, and only some heads and columns of them under the others."""
    model = checkpoint("bert")
    plans = (
        plan("tensor", 0, 1, 2, dtype=dtype),
        plan("sequence", 0, 1, 2, dtype=dtype),
        plan("tensor", 0, 2, dtype=dtype),
    )
    wanted = Engine(model, plan=plan("single", 0, dtype=dtype)).hidden(IDS, ATTENDED)
    tolerance = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.1}[dtype] * float(wanted.abs().max())
    known: list[dict[Piece, Layer]] = [{}, {}, {}]

    def work(group: Group) -> None:
        planner = cast(RuntimePlanner, Turns(len(plans))) if group.rank == 0 else None
        arranged = Arrangement(group=group, plans=plans, planner=planner, is_frugal=True)
        with Engine(model, arranged=arranged, known=known[group.rank]) as engine:
            held = sum(layer.num_bytes for layer in known[group.rank].values())
            assert held == resident_bytes(plans, engine.spec, 3, is_frugal=True)[group.rank]
            if dtype == "fp32":  # each part has scales of its own in 8 bits
                assert held == resident_bytes(plans[1:2], engine.spec, 3)[group.rank]
            if not engine.is_leader:
                engine.follow()
                return
            for _ in plans:
                found = engine.hidden(IDS, ATTENDED)
                torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)

    on_devices(3, work)


def test_tokens_are_the_same_under_every_plan(checkpoint: Checkpoint) -> None:
    plans = (plan("tensor", 0, 1), plan("single", 0), plan("tensor", 0, 1, algorithm="mesh"))
    settings = GenerationSettings(max_new_tokens=5)
    wanted = Engine(checkpoint("llama")).generate_tokens(IDS, ATTENDED, settings)

    def work(group: Group) -> None:
        planner = cast(RuntimePlanner, Turns(3)) if group.rank == 0 else None
        with Engine(checkpoint("llama"), arranged=Arrangement(group=group, plans=plans, planner=planner)) as engine:
            if not engine.is_leader:
                return engine.follow()
            for _ in range(4):
                assert torch.equal(engine.generate_tokens(IDS, ATTENDED, settings), wanted)

    on_devices(2, work)


def test_what_the_caller_does_with_tokens_is_not_held_against_a_plan(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, planner = 0.0, Turns(1)
    monkeypatch.setattr("isthmus.inference.session.time", SimpleNamespace(perf_counter=lambda: now_s))

    def on_tokens(ids: list[int]) -> bool:
        nonlocal now_s
        now_s += 1.0
        return now_s == 3.0

    arranged = Arrangement(group=None, plans=(plan("single", 0),), planner=cast(RuntimePlanner, planner))
    with Engine(checkpoint("llama"), arranged=arranged) as engine:
        engine.generate_tokens(IDS, ATTENDED, GenerationSettings(max_new_tokens=5), on_tokens)
        engine.generate_tokens(IDS, ATTENDED, GenerationSettings(max_new_tokens=5))
    assert planner.asked[0] == InferenceRequest(num_tokens=11, batch=2, num_new_tokens=5)
    given = InferenceRequest(num_tokens=11, batch=2, num_new_tokens=3)
    assert planner.answers == [Answer(request=given, number=0, seconds=0.0)]


def test_the_leader_hears_of_rates_before_it_chooses_again(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Turns(1)
    monkeypatch.setattr(Group, "take_arrival_rates", lambda self: {peer: 1.0 + self.rank for peer in self.peers})

    def work(group: Group) -> None:
        chooses = cast(RuntimePlanner, planner) if group.rank == 0 else None
        arranged = Arrangement(group=group, plans=(plan("tensor", 0, 2), plan("tensor", 0, 1, 2)), planner=chooses)
        with Engine(checkpoint("bert"), arranged=arranged) as engine:
            if not engine.is_leader:
                return engine.follow()
            engine.mean(IDS, ATTENDED)
            engine.mean(IDS, ATTENDED)

    on_devices(3, work)
    assert planner.observed == [[[0.0] * 3] * 3, [[0, 0, 1], [0, 0, 0], [2, 0, 0]]]
