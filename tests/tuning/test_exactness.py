"""Whatever runs where, training is the same computation as plain transformers with torch.optim.AdamW."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import reference
from transformers import AutoConfig

from isthmus.models.tiny import FAMILIES, write_tiny_checkpoint
from isthmus.reporting.recorder import Recorder
from isthmus.spec.units import parse_emulate
from isthmus.tuning.data import MicroBatch
from isthmus.tuning.grouped import GroupedExperts, Run
from isthmus.tuning.loader import ExpertLoader
from isthmus.tuning.placement import BudgetError
from isthmus.tuning.run import write_final
from isthmus.tuning.session import Session, SessionOptions

LEARNING_RATE = 1e-3
NUM_STEPS = 20
POLICIES = ("affinity", "paper", "mobius", "gpipe-offload", "cpu-experts", "resident")
EMULATED = SessionOptions(
    accelerator="emulated",
    emulation=parse_emulate("h2d=200MB/s,d2h=200MB/s,threads=1"),
    accelerator_memory_bytes=1,
    weight_decay=0.01,
    num_in_flight=3,
)
"""All micro-batches in flight, which takes most memory; for fewer see ``test_flights``."""


@dataclass(frozen=True)
class Case:
    path: Path
    steps: list[list[MicroBatch]]
    wanted: reference.Reference


def make_case(family: str, path: Path, *, num_steps: int, **changes: Any) -> Case:
    """A tiny checkpoint at ``path``, its config changed, with what plain training makes of it."""
    write_tiny_checkpoint(family, path, 0, "fp32", **changes)
    config = AutoConfig.from_pretrained(path)
    steps = reference.random_steps(
        num_steps, 3, vocab_size=config.vocab_size, is_encoder_decoder=config.is_encoder_decoder
    )
    return Case(path, steps, reference.train(path, steps, learning_rate=LEARNING_RATE, weight_decay=0.01))


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A tiny checkpoint by family, with what plain training makes of it. Made once per family."""
    known: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in known:
            known[family] = make_case(family, tmp_path_factory.mktemp(family) / "model", num_steps=NUM_STEPS)
        return known[family]

    return get


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class Grouped(GroupedExperts):
    """Notes the number of experts in each group."""

    sizes: list[int]

    @classmethod
    def noting(cls, session: Session, sizes: list[int]) -> Grouped:
        assert isinstance(session.placement.loader, ExpertLoader)
        made = cls.of(session.model, session.placement.loader)
        made.sizes = sizes
        return made

    def runs(self, *args: Any, **kwargs: Any) -> Iterator[Run]:
        for run in super().runs(*args, **kwargs):
            self.sizes.append(len(run.experts))
            yield run


def with_budget(case: Case, options: SessionOptions, *, more_slots: int) -> SessionOptions:
    """The least budget that the policy accepts, and room for some more experts."""
    with pytest.raises(BudgetError, match="under the minimum") as error:
        Session(case.path, options, case.steps[0], Recorder(enabled=False))
    expert_bytes = 24 * 1024
    return replace(options, accelerator_memory_bytes=error.value.minimum_bytes + more_slots * expert_bytes)


def compare(
    case: Case,
    output: Path,
    options: SessionOptions,
    copy_delay: Callable[[], float] | None = None,
    before_step: Callable[[Session, int], None] = lambda session, step: None,
    group_sizes: list[int] | None = None,
) -> None:
    """FP32: losses within 1e-5, final weights within 1e-4 of the size of the update. ``group_sizes``: experts are
    computed in groups, whose sizes are put in there."""
    losses = []
    recorder = Recorder(keep_spans=False)
    with Session(case.path, options, case.steps[0], recorder, copy_delay=copy_delay) as session:
        if group_sizes is not None:
            session.engine.resources.grouped = Grouped.noting(session, group_sizes)
        for number, batches in enumerate(case.steps, start=1):
            before_step(session, number)
            losses.append(session.train_step(batches, step=number, learning_rate=LEARNING_RATE).loss)
        output.mkdir()
        write_final(session, output, case.path)
        assert session.accelerator.peak_bytes <= session.accelerator.budget_bytes
    assert losses == pytest.approx(case.wanted.losses, rel=1e-5)
    after = reference.state(reference.load(output))
    assert after.keys() == case.wanted.after.keys()
    # Softmax does not see a key's bias: its gradient is rounding alone, which Adam scales up to full steps.
    names = [name for name in after if not name.endswith("k_proj.bias")]
    difference = sum(float((after[name] - case.wanted.after[name]).square().sum()) for name in names)
    update = sum(float((case.wanted.after[name] - case.wanted.before[name]).square().sum()) for name in names)
    assert difference**0.5 <= 1e-4 * update**0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_plain_transformers_in_place(
    family: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    compare(case(family), tmp_path / "out", SessionOptions(accelerator="host", weight_decay=0.01))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_plain_transformers_with_experts_on_both_sides(
    family: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    options = with_budget(case(family), EMULATED, more_slots=4)
    compare(case(family), tmp_path / "out", options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("more_slots", [0, 6])
def test_no_policy_and_no_budget_changes_a_result(
    policy: str, more_slots: int, case: Callable[[str], Case], tmp_path: Path
) -> None:
    options = with_budget(case("mixtral"), replace(EMULATED, policy=policy), more_slots=more_slots)
    compare(case("mixtral"), tmp_path / "out", options)


@pytest.mark.parametrize("policy", ["affinity", "paper", "mobius"])
def test_late_copies_change_no_result(policy: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    chance = random.Random(policy)
    options = with_budget(case("qwen3_moe"), replace(EMULATED, policy=policy), more_slots=3)
    compare(case("qwen3_moe"), tmp_path / "out", options, copy_delay=lambda: chance.random() * 3e-3)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("mixtral", "resident"),
        ("qwen3_moe", "resident"),
        ("gpt_oss", "mobius"),
        ("switch_transformers", "resident"),
        ("nllb-moe", "mobius"),
    ],
)
def test_grouped_experts_train_as_plain_transformers(
    family: str, policy: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    options = with_budget(case(family), replace(EMULATED, policy=policy), more_slots=0)
    sizes: list[int] = []
    compare(case(family), tmp_path / "out", options, group_sizes=sizes)
    assert max(sizes) >= 3


@pytest.mark.parametrize(
    ("policy", "num_waves", "more_slots"), [("mobius", 2, 2), ("paper", 1, 0), ("paper", 2, 3), ("affinity", 3, 5)]
)
def test_grouped_experts_that_land_late_or_have_few_slots_change_no_result(
    policy: str, num_waves: int, more_slots: int, case: Callable[[str], Case], tmp_path: Path
) -> None:
    chance = random.Random(policy)
    wanted = replace(EMULATED, policy=policy, num_waves=num_waves)
    options = with_budget(case("qwen3_moe"), wanted, more_slots=more_slots)
    delay = lambda: chance.random() * 2e-3  # noqa: E731
    sizes: list[int] = []
    compare(case("qwen3_moe"), tmp_path / "out", options, copy_delay=delay, group_sizes=sizes)
    assert sizes


@pytest.mark.parametrize(("num_stages", "num_waves"), [(1, 1), (2, 3), (2, 2), (1, 3)])
def test_no_number_of_stages_or_waves_changes_a_result(
    num_stages: int, num_waves: int, case: Callable[[str], Case], tmp_path: Path
) -> None:
    staged = replace(EMULATED, policy="paper", num_stages=num_stages, num_waves=num_waves, cpu_speed=0.5)
    compare(case("olmoe"), tmp_path / "out", with_budget(case("olmoe"), staged, more_slots=4))


@pytest.mark.parametrize(
    ("accelerator", "family"),
    [(kind, family) for kind in ("host", "emulated") for family in ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")]
    + [("grouped", "mixtral"), ("grouped", "gpt_oss")],
)
def test_bf16_losses_stay_within_one_percent(
    family: str, accelerator: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    # At 1e-3 a tiny router flips choices on rounding alone; either side's loss then leaves FP32's by over 1e-2.
    rate = 0.3 * LEARNING_RATE
    plain = case(family)
    wanted = reference.train(plain.path, plain.steps, learning_rate=rate, dtype=torch.bfloat16)
    policy = "resident" if accelerator == "grouped" else "affinity"
    options = replace(EMULATED, dtype="bf16", weight_decay=0.0, policy=policy)
    if accelerator == "host":
        options = SessionOptions(accelerator="host", dtype="bf16")
    else:
        options = with_budget(plain, options, more_slots=4)
    sizes: list[int] = []
    with Session(plain.path, options, plain.steps[0], Recorder(enabled=False)) as session:
        if accelerator == "grouped":
            session.engine.resources.grouped = Grouped.noting(session, sizes)
        losses = [
            session.train_step(batches, step=number, learning_rate=rate).loss
            for number, batches in enumerate(plain.steps, start=1)
        ]
    assert losses == pytest.approx(wanted.losses, rel=1e-2)
    assert bool(sizes) == (accelerator == "grouped")


def test_nothing_runs_on_after_a_session_is_closed(case: Callable[[str], Case]) -> None:
    import threading

    before = set(threading.enumerate())
    options = with_budget(case("mixtral"), EMULATED, more_slots=4)
    with Session(case("mixtral").path, options, case("mixtral").steps[0], Recorder(enabled=False)) as session:
        session.train_step(case("mixtral").steps[0], step=1, learning_rate=LEARNING_RATE)
    deadline_s = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("isthmus")}
