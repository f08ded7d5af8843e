"""Memory as predicted from a configuration alone is what a run accounts for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests import reference

from isthmus.models.config import load_config
from isthmus.models.tiny import write_tiny_checkpoint
from isthmus.planning.memory import (
    accelerator_memory,
    flight_that_fits,
    host_bytes,
    landing_bytes,
    minimum_bytes,
    staging_bytes,
)
from isthmus.reporting.recorder import Recorder
from isthmus.spec.units import parse_emulate
from isthmus.tuning.data import MicroBatch
from isthmus.tuning.host_buffers import HostBuffers
from isthmus.tuning.placement import BudgetError
from isthmus.tuning.preflight.blueprint import blueprint_of
from isthmus.tuning.session import Session, SessionOptions

EMULATION = parse_emulate("h2d=1GB/s,d2h=1GB/s,threads=1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make(family: str, path: Path, *, num_micro_batches: int = 3, seq_len: int = 24) -> list[MicroBatch]:
    """A tiny checkpoint at ``path``, and one step's micro-batches."""
    config = write_tiny_checkpoint(family, path, 0, "fp32")
    is_encoder_decoder = config.is_encoder_decoder
    steps = reference.random_steps(
        1, num_micro_batches, vocab_size=128, seq_len=seq_len, is_encoder_decoder=is_encoder_decoder
    )
    return steps[0]


@pytest.mark.parametrize(
    ("family", "policy", "dtype", "more_slots", "num_micro_batches", "num_in_flight"),
    [
        ("mixtral", "affinity", "fp32", 0, 3, 3),
        ("mixtral", "cpu-experts", "bf16", 3, 2, 2),
        ("qwen2_moe", "mobius", "fp32", 2, 1, 1),
        ("qwen3_moe", "resident", "bf16", 0, 4, 4),
        ("deepseek_v3", "affinity", "bf16", 5, 2, 2),
        ("gpt_oss", "paper", "fp32", 1000, 2, 2),
        ("switch_transformers", "affinity", "bf16", 4, 2, 2),
        ("mixtral", "affinity", "fp32", 0, 6, 2),
        ("qwen3_moe", "mobius", "bf16", 1, 5, 1),
        ("gpt_oss", "paper", "fp32", 3, 5, 3),
    ],
)
def test_predicted_memory_is_what_a_run_accounts_for(
    family: str,
    policy: str,
    dtype: str,
    more_slots: int,
    num_micro_batches: int,
    num_in_flight: int,
    tmp_path: Path,
) -> None:
    batches = make(family, tmp_path / "model", num_micro_batches=num_micro_batches)
    part = blueprint_of(load_config(tmp_path / "model"), dtype, batches[0].inputs).whole
    minimum = minimum_bytes(part, num_in_flight, policy)
    budget = minimum + more_slots * part.slot_bytes + part.slot_bytes // 2
    options = SessionOptions(
        accelerator="emulated",
        emulation=EMULATION,
        accelerator_memory_bytes=budget,
        policy=policy,
        dtype=dtype,
        num_in_flight=num_in_flight,
    )
    predicted = accelerator_memory(part, num_in_flight, policy, budget)
    assert flight_that_fits(part, num_micro_batches, policy, budget, num_in_flight) == num_in_flight
    with Session(tmp_path / "model", options, batches, Recorder(enabled=False)) as session:
        session.train_step(batches, step=1, learning_rate=1e-3)
        session.train_step(batches, step=2, learning_rate=1e-3)
        session.finish()
        measured = session.accelerator.peak_bytes
        assert measured <= predicted.peak_bytes <= 1.05 * measured
        plan = session.plan
        assert (plan.num_slots, plan.is_dense_resident) == (predicted.num_slots, predicted.is_dense_resident)
        assert plan.num_in_flight == num_in_flight
        assert (plan.dense_bytes, plan.activation_bytes) == (predicted.dense_bytes, predicted.activation_bytes)
        assert host_bytes(part.layouts.values()) == session.store.bytes_by_kind()
        assert taken_bytes(session.engine.resources.buffers) <= staging_bytes(part, num_in_flight)
        ways_back = session.engine.resources.gradients.way_back, session.dense.way_back
        landed_bytes = sum(taken_bytes(way.buffers) for way in ways_back)
        if num_in_flight == num_micro_batches:
            assert not landed_bytes
        assert landed_bytes <= landing_bytes(part, predicted)


def taken_bytes(buffers: HostBuffers) -> int:
    taken = [*buffers._lent.values(), *(flat for free in buffers._free.values() for flat in free)]
    return sum(flat.nbytes for flat in taken)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("more_bytes", [0, 1000])
def test_as_many_are_in_flight_as_was_predicted(size: int, more_bytes: int, tmp_path: Path) -> None:
    batches = make("mixtral", tmp_path / "model", num_micro_batches=6)
    part = blueprint_of(load_config(tmp_path / "model"), "fp32", batches[0].inputs).whole
    budget = minimum_bytes(part, size, "affinity") + more_bytes
    options = SessionOptions(accelerator="emulated", emulation=EMULATION, accelerator_memory_bytes=budget)
    with Session(tmp_path / "model", options, batches, Recorder(enabled=False)) as session:
        found = session.plan.num_in_flight
    assert found == size == flight_that_fits(part, len(batches), "affinity", budget)


def test_the_predicted_minimum_is_what_a_run_says_it_is(tmp_path: Path) -> None:
    batches = make("mixtral", tmp_path / "model")
    part = blueprint_of(load_config(tmp_path / "model"), "fp32", batches[0].inputs).whole
    options = SessionOptions(accelerator="emulated", emulation=EMULATION, accelerator_memory_bytes=1)
    with pytest.raises(BudgetError) as caught:
        Session(tmp_path / "model", options, batches, Recorder(enabled=False))
    assert caught.value.minimum_bytes == minimum_bytes(part, 1, "affinity")
    assert "activations of one micro-batch" in str(caught.value)
    with pytest.raises(BudgetError, match=r"activations of 3 micro-batches .* --micro-batches-in-flight") as caught:
        Session(tmp_path / "model", replace(options, num_in_flight=3), batches, Recorder(enabled=False))
    assert caught.value.minimum_bytes == minimum_bytes(part, 3, "affinity")
