"""Micro-batches that go in flights train as all at once do, and keep no more activations than there is room for."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.tuning.test_exactness import EMULATED, LEARNING_RATE, Case, compare, make_case
from tests.tuning.test_streaming import LAYERS, is_streamed, least, open_session

from isthmus.tuning.checkpoint import load_training_state, save_training_state
from isthmus.tuning.loader import ExpertLoader
from isthmus.tuning.policies import PolicySeat
from isthmus.tuning.policies.base import StagedPolicy
from isthmus.tuning.session import SessionOptions
from isthmus.tuning.tape import Tape

NUM_STEPS = 6


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Models of more layers than buffers; steps of three micro-batches."""
    known: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in known:
            path = tmp_path_factory.mktemp(family) / "model"
            known[family] = make_case(family, path, num_steps=NUM_STEPS, **LAYERS[family])
        return known[family]

    return get


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_flights_train_as_plain_transformers_in_place(
    family: str, num_in_flight: int, case: Callable[[str], Case], tmp_path: Path
) -> None:
    options = SessionOptions(accelerator="host", weight_decay=0.01, num_in_flight=num_in_flight)
    compare(case(family), tmp_path / "out", options)


@pytest.mark.parametrize(
    ("family", "policy", "num_in_flight", "more_slots"),
    [
        ("mixtral", "affinity", 1, 4),
        ("mixtral", "mobius", 2, 1),
        ("qwen2_moe", "paper", 1, 3),
        ("deepseek_v3", "cpu-experts", 2, 0),
        ("qwen3_moe", "gpipe-offload", 1, 1),
        ("nllb-moe", "affinity", 2, 0),
    ],
)
def test_flights_train_as_plain_transformers_streamed_with_late_copies(
    family: str, policy: str, num_in_flight: int, more_slots: int, case: Callable[[str], Case], tmp_path: Path
) -> None:
    chance = random.Random(policy)
    options = least(
        case(family),
        replace(EMULATED, policy=policy, num_in_flight=num_in_flight),
        more_bytes=more_slots * 24 * 1024,
    )
    delay = lambda: chance.random() * 2e-3  # noqa: E731
    compare(case(family), tmp_path / "out", options, copy_delay=delay, before_step=is_streamed)


@pytest.mark.parametrize("policy", ["affinity", "resident"])
def test_flights_train_as_plain_transformers_with_all_resident(
    policy: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    options = replace(EMULATED, policy=policy, num_in_flight=1, accelerator_memory_bytes=1 << 24)
    compare(case("qwen3_moe"), tmp_path / "out", options)


@pytest.mark.parametrize("accelerator", ["host", "emulated"])
@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_no_more_activations_are_kept_than_are_in_flight(
    num_in_flight: int, accelerator: str, case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Tape] = weakref.WeakSet()
    kept: list[int] = []
    original = Tape.run_layer

    def counted(tape: Tape, *args: Any) -> object:
        alive.add(tape)
        kept.append(len(alive))
        return original(tape, *args)

    monkeypatch.setattr(Tape, "run_layer", counted)
    plain = case("mixtral")
    options = replace(EMULATED, num_in_flight=num_in_flight, accelerator_memory_bytes=1 << 24)
    if accelerator == "host":
        options = SessionOptions(accelerator="host", num_in_flight=num_in_flight)
    with open_session(plain, options) as session:
        for number in (1, 2):
            session.train_step(plain.steps[0], step=number, learning_rate=LEARNING_RATE)
    assert max(kept) == num_in_flight


def test_as_many_are_in_flight_as_fit(case: Callable[[str], Case]) -> None:
    plain = case("qwen3_moe")
    wanted: dict[int, SessionOptions] = {
        size: least(plain, replace(EMULATED, num_in_flight=size)) for size in (1, 2, 3)
    }
    for size, options in wanted.items():
        free = replace(options, num_in_flight=None)
        with open_session(plain, free) as session:
            assert session.plan.num_in_flight == size
            assert session.engine.num_in_flight == size
        if size > 1:
            assert free.accelerator_memory_bytes is not None
            with open_session(plain, replace(free, accelerator_memory_bytes=free.accelerator_memory_bytes - 1)) as less:
                assert less.plan.num_in_flight == size - 1
    assert least(plain, replace(EMULATED, num_in_flight=None)) == replace(wanted[1], num_in_flight=None)


def test_a_loss_that_is_not_finite_in_a_later_flight_leaves_no_gradients(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = case("mixtral")
    losses = []
    for fails in (False, True):
        options = replace(EMULATED, num_in_flight=1, accelerator_memory_bytes=1 << 24)
        with open_session(plain, options) as session:
            if fails:
                with monkeypatch.context() as patch:
                    patch.setattr(session.engine, "_loss", Mock(side_effect=[0.1, float("nan")]))
                    assert not session.train_step(plain.steps[1], step=1, learning_rate=LEARNING_RATE).is_finite
            losses.append(
                [session.train_step(plain.steps[0], step=number, learning_rate=LEARNING_RATE).loss for number in (1, 2)]
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("policy", ["affinity", "paper", "mobius"])
def test_the_next_flight_finds_its_first_experts_there(policy: str, case: Callable[[str], Case]) -> None:
    plain = case("mixtral")
    # The slower the CPU, the surer some experts are wanted on the accelerator, however busy the machine.
    slow = replace(EMULATED, policy=policy, num_in_flight=1, num_stages=4, cpu_speed=0.1)
    options = least(plain, slow, more_bytes=16 * 24 * 1024)
    with open_session(plain, options) as session:
        loader, seat = session.placement.loader, session.placement.policy
        assert isinstance(loader, ExpertLoader) and isinstance(seat, PolicySeat)
        inner = seat.policy
        assert isinstance(inner, StagedPolicy)
        found: list[tuple[set[Any], set[Any]]] = []
        begin = inner.begin_forward

        def begin_forward() -> None:
            if inner._is_backward and inner._is_followed:
                there = {*loader.resident_keys(), *loader.in_flight_keys()}
                found.append((there, {key for key in inner.first_wanted() if key.layer == 0}))
            begin()

        inner.begin_forward = begin_forward  # type: ignore[method-assign]
        for number, batches in enumerate(plain.steps[:3], start=1):
            session.train_step(batches, step=number, learning_rate=LEARNING_RATE)
    assert len(found) == 3 * 2
    # Without what is queued at the border Equation 1's rule finds one in four.
    num_wanted = sum(len(wanted) for _, wanted in found)
    assert sum(len(wanted & there) for there, wanted in found) >= 0.7 * num_wanted > 0


def test_a_run_goes_on_with_another_number_in_flight(case: Callable[[str], Case], tmp_path: Path) -> None:
    plain = case("mixtral")
    losses = []
    for number, num_in_flight in enumerate((2, 1, None)):
        options = replace(EMULATED, num_in_flight=num_in_flight, accelerator_memory_bytes=1 << 24)
        with open_session(plain, options) as session:
            if number:
                load_training_state(tmp_path / f"step-{number}", session.store, session.optimizer)
                session.weights_changed()
            outcome = session.train_step(plain.steps[number], step=number + 1, learning_rate=LEARNING_RATE)
            losses.append(outcome.loss)
            session.finish()
            save_training_state(tmp_path / f"step-{number + 1}", session.store, session.optimizer, {})
    assert losses == pytest.approx(plain.wanted.losses[:3], rel=1e-5)
    assert all(torch.isfinite(torch.tensor(losses)))
