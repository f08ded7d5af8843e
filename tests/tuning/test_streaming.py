"""Dense parts that do not fit pass through a few buffers, layer by layer: no result changes, no budget is broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tuning.test_exactness import EMULATED, LEARNING_RATE, Case, compare, make_case

from isthmus.reporting.recorder import Recorder
from isthmus.tuning.checkpoint import load_training_state, save_training_state
from isthmus.tuning.placement import BudgetError
from isthmus.tuning.session import Session, SessionOptions

NUM_STEPS = 5
LAYERS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_hidden_layers=7, tie_word_embeddings=True),
    "qwen2_moe": dict(num_hidden_layers=8, mlp_only_layers=[0, 3, 7]),
    "qwen3_moe": dict(num_hidden_layers=6),
    "deepseek_v3": dict(num_hidden_layers=7, first_k_dense_replace=2),
    "gpt_oss": dict(num_hidden_layers=6),
    "switch_transformers": dict(
        num_layers=4, num_decoder_layers=6, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2
    ),
    "nllb-moe": dict(encoder_layers=5, decoder_layers=4),
}
"""Families with more layers than buffers; dense layers first, between and last."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
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


def open_session(case: Case, options: SessionOptions) -> Session:
    return Session(case.path, options, case.steps[0], Recorder(enabled=False))


def least(case: Case, options: SessionOptions, *, more_bytes: int = 0) -> SessionOptions:
    with pytest.raises(BudgetError) as error:
        open_session(case, replace(options, accelerator_memory_bytes=1))
    return replace(options, accelerator_memory_bytes=error.value.minimum_bytes + more_bytes)


def is_streamed(session: Session, step: int) -> None:
    plan = session.plan
    assert not plan.is_dense_resident
    whole = sum(2 * session.store.weight(key).nbytes for key in session.store.keys if not key.is_expert)
    assert plan.dense_bytes < whole
    slots_bytes = plan.num_slots * plan.slot_bytes
    assert plan.dense_bytes + plan.activation_bytes + slots_bytes == session.accelerator.allocated_bytes


@pytest.mark.parametrize("family", LAYERS)
def test_every_family_trains_as_plain_transformers_in_the_least_budget(
    family: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    compare(case(family), tmp_path / "out", least(case(family), EMULATED), before_step=is_streamed)


@pytest.mark.parametrize(("policy", "num_waves"), [("affinity", 3), ("paper", 1), ("mobius", 2), ("cpu-experts", 2)])
def test_late_copies_change_no_result(policy: str, num_waves: int, case: Callable[[str], Case], tmp_path: Path) -> None:
    chance = random.Random(policy)
    options = least(case("deepseek_v3"), replace(EMULATED, policy=policy, num_waves=num_waves))
    compare(
        case("deepseek_v3"),
        tmp_path / "out",
        options,
        copy_delay=lambda: chance.random() * 2e-3,
        before_step=is_streamed,
    )


def test_evaluation_between_steps_sees_the_new_weights_and_changes_nothing(
    case: Callable[[str], Case], tmp_path: Path
) -> None:
    plain, chance = case("mixtral"), random.Random(0)

    def evaluate(session: Session, step: int) -> None:
        for _ in range(step % 3):
            loss = session.evaluate(plain.steps[step - 1])
            assert loss == pytest.approx(plain.wanted.losses[step - 1], rel=1e-5)

    options = least(plain, EMULATED)
    compare(plain, tmp_path / "out", options, copy_delay=lambda: chance.random() * 2e-3, before_step=evaluate)


def test_a_byte_under_the_stated_minimum_is_refused(case: Callable[[str], Case]) -> None:
    options = least(case("mixtral"), EMULATED, more_bytes=-1)
    stated = options.accelerator_memory_bytes
    assert stated is not None
    with pytest.raises(BudgetError, match=rf"under the minimum of {stated + 1} .*of 3 of the 7 layers at a time"):
        open_session(case("mixtral"), options)


def test_dense_parts_stay_as_soon_as_the_budget_holds_them(case: Callable[[str], Case]) -> None:
    with open_session(case("mixtral"), least(case("mixtral"), EMULATED)) as session:
        units = {key: session.store.weight(key).nbytes for key in session.store.keys if not key.is_expert}
        more_bytes = 2 * sum(units.values()) - session.plan.dense_bytes
        assert session.dense.h2d_bytes(is_backward=False) == sum(units.values())
        assert session.dense.h2d_bytes(is_backward=True) == sum(
            num_bytes for key, num_bytes in units.items() if 0 <= key.layer < 7 - 3
        )
    with open_session(case("mixtral"), least(case("mixtral"), EMULATED, more_bytes=more_bytes - 1)) as session:
        assert not session.plan.is_dense_resident
    with open_session(case("mixtral"), least(case("mixtral"), EMULATED, more_bytes=more_bytes)) as session:
        assert session.plan.is_dense_resident and session.plan.dense_bytes == 2 * sum(units.values())
        assert session.dense.h2d_bytes(is_backward=True) == 0
        assert session.accelerator.peak_bytes <= session.accelerator.budget_bytes


def test_a_step_loads_what_the_bound_counts(case: Callable[[str], Case]) -> None:
    plain, recorder = case("deepseek_v3"), Recorder()
    with Session(plain.path, least(plain, EMULATED), plain.steps[0], recorder) as session:

        def loaded_bytes() -> int:
            session.finish()
            return sum(span.num_bytes for span in recorder.timeline().spans if span.kind == "load_dense")

        session.train_step(plain.steps[0], step=1, learning_rate=LEARNING_RATE)
        before_bytes = loaded_bytes()
        session.train_step(plain.steps[1], step=2, learning_rate=LEARNING_RATE)
        counted_bytes = sum(session.dense.h2d_bytes(is_backward=is_backward) for is_backward in (False, True))
        assert loaded_bytes() - before_bytes == counted_bytes


def test_the_predictor_starts_from_the_routers_own_weights(case: Callable[[str], Case]) -> None:
    with open_session(case("mixtral"), least(case("mixtral"), EMULATED)) as streamed:
        got = streamed.placement.predictor
    with open_session(case("mixtral"), replace(EMULATED, accelerator_memory_bytes=1 << 30)) as resident:
        wanted = resident.placement.predictor
    assert got is not None and wanted is not None
    for name, tensor in wanted.state_dict().items():
        assert got.state_dict()[name].equal(tensor), name


def test_a_streamed_run_resumes_where_a_resident_one_stopped(case: Callable[[str], Case], tmp_path: Path) -> None:
    plain, losses = case("qwen3_moe"), []
    streamed, resident = least(plain, EMULATED), replace(EMULATED, accelerator_memory_bytes=1 << 30)
    for number, options in enumerate((resident, streamed, resident)):
        with open_session(plain, options) as session:
            assert session.plan.is_dense_resident == (options is resident)
            if number:
                load_training_state(tmp_path / str(number), session.store, session.optimizer)
                session.weights_changed()
            step = number + 1
            losses.append(session.train_step(plain.steps[number], step=step, learning_rate=LEARNING_RATE).loss)
            session.finish()
            save_training_state(tmp_path / str(step), session.store, session.optimizer, {})
    assert losses == pytest.approx(plain.wanted.losses[:3], rel=1e-5)
