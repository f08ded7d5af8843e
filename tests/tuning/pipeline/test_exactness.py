"""However many processes share a model, in however many stages, they train it as plain transformers does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import reference
from tests.tuning.pipeline import ranks
from transformers import AutoConfig

from isthmus.models.tiny import FAMILIES, write_tiny_checkpoint
from isthmus.reporting.recorder import Recorder
from isthmus.tuning.output import write_final
from isthmus.tuning.pipeline.wire import WIRES
from isthmus.tuning.session import Session, SessionOptions

NUM_STEPS = 6
# In so few steps Adam would scale gradients that are rounding alone up to full steps: some of the embeddings' are.
OPTIMIZER: dict[str, Any] = {"weight_decay": 0.01, "epsilon": 1e-6}
EMULATED = {
    "mixtral": ("affinity", 4),
    "qwen3_moe": ("paper", 4),
    "gpt_oss": ("mobius", 8),
    "switch_transformers": ("affinity", 8),
    "nllb-moe": ("mobius", 8),
}
"""Policy and number of stages, with four processes and eight layers. In four stages two layers hold gradients at once
in few slots; in eight some of an encoder-decoder's processes have no routed experts at all."""
ALSO_EMULATED = {
    "qwen2_moe": ("affinity", 8),
    "olmoe": ("paper", 8),
    "deepseek_v2": ("affinity", 8),
    "deepseek_v3": ("mobius", 8),
}
"""Decoders much like those above: in tests that are run less often."""


def layers(family: str, number: int) -> dict[str, Any]:
    """The fields of a configuration with so many layers; encoder and decoder have half of them each.

    GELU for ReLU: where a unit's input is within rounding of 0, ReLU's gradient is either 0 or not, and so many steps
    meet such an input on one kind of CPU or another (``tests/tuning/test_exactness.py`` has ReLU).
    """
    if family == "switch_transformers":
        half = {"num_layers": number // 2, "num_decoder_layers": number // 2, "dense_act_fn": "gelu"}
        return half | {"num_sparse_encoder_layers": number // 4, "num_sparse_decoder_layers": number // 4}
    if family == "nllb-moe":
        return {"encoder_layers": number // 2, "decoder_layers": number // 2, "activation_function": "gelu"}
    return {"num_hidden_layers": number}


def make_job(family: str, folder: Path, num_layers: int, *, more_slots: int | None = None, **options: Any) -> ranks.Job:
    write_tiny_checkpoint(family, folder / family, 0, "fp32", **layers(family, num_layers))
    return ranks.Job(
        name=family,
        model=str(folder / family),
        num_steps=NUM_STEPS,
        options=OPTIMIZER | options,
        more_slots=more_slots,
    )


def steps_of(job: ranks.Job) -> list[Any]:
    config = AutoConfig.from_pretrained(job.model)
    return reference.random_steps(
        job.num_steps,
        job.num_micro_batches,
        vocab_size=config.vocab_size,
        is_encoder_decoder=config.is_encoder_decoder,
    )


def compare(job: ranks.Job, losses: list[float], output: Path, wanted: reference.Reference) -> None:
    """FP32: losses within 1e-5, final weights within 1e-4 of the size of the update."""
    assert losses[:NUM_STEPS] == pytest.approx(wanted.losses, rel=1e-5), job.name
    after = reference.state(reference.load(output))
    assert after.keys() == wanted.after.keys()
    # Softmax does not see a key's bias: its gradient is rounding alone, which Adam scales up to full steps.
    names = [name for name in after if not name.endswith("k_proj.bias")]
    difference = sum(float((after[name] - wanted.after[name]).square().sum()) for name in names)
    update = sum(float((wanted.after[name] - wanted.before[name]).square().sum()) for name in names)
    assert difference**0.5 <= 1e-4 * update**0.5, job.name


def train_and_compare(num_ranks: int, jobs: list[ranks.Job], folder: Path) -> None:
    losses = ranks.run(num_ranks, jobs, folder)
    for job in jobs:
        path = Path(job.model)
        wanted = reference.train(path, steps_of(job), learning_rate=ranks.LEARNING_RATE, **OPTIMIZER)
        compare(job, losses[job.name], folder / job.name, wanted)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_two_processes_train_every_family_as_plain_transformers_in_place(tmp_path: Path) -> None:
    # Of six layers a decoder's first is not on rank 0, where its embeddings are; of three stages the last is.
    numbers = dict.fromkeys(FAMILIES, (4, 4)) | {"switch_transformers": (6, 6), "nllb-moe": (6, 6), "olmoe": (4, 3)}
    jobs = [
        make_job(family, tmp_path, num_layers, accelerator="host", num_stages=num_stages)
        for family, (num_layers, num_stages) in numbers.items()
    ]
    train_and_compare(2, jobs, tmp_path / "out")


@pytest.mark.parametrize("families", [EMULATED, pytest.param(ALSO_EMULATED, marks=pytest.mark.long)], ids=" ".join)
def test_four_processes_train_as_plain_transformers_with_experts_on_both_sides(
    families: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    jobs = [
        make_job(
            family,
            tmp_path,
            8,
            accelerator="emulated",
            policy=policy,
            num_stages=num_stages,
            num_in_flight=ranks.NUM_MICRO_BATCHES,
            more_slots=2,
        )
        for family, (policy, num_stages) in families.items()
    ]
    train_and_compare(4, jobs, tmp_path / "out")


def test_two_processes_whose_micro_batches_go_in_flights_train_as_plain_transformers(tmp_path: Path) -> None:
    # Without a number each process finds how many fit it, and all take the least.
    emulated: dict[str, Any] = {"accelerator": "emulated", "num_stages": 4, "more_slots": 2}
    jobs = [
        make_job("gpt_oss", tmp_path, 4, accelerator="host", num_stages=4, num_in_flight=1),
        make_job("switch_transformers", tmp_path, 4, accelerator="host", num_stages=4, num_in_flight=2),
        make_job("mixtral", tmp_path, 4, policy="affinity", **emulated),
        make_job("qwen3_moe", tmp_path, 4, policy="mobius", num_in_flight=2, **emulated),
    ]
    train_and_compare(2, jobs, tmp_path / "out")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_who_carries_tensors_changes_no_bit(num_ranks: int, tmp_path: Path) -> None:
    # Outputs to rank 0, gradients, router logits, an encoder's output; and what a codec has made of hidden states.
    made = (
        make_job(family, tmp_path, 8, accelerator="host", num_stages=8, num_in_flight=2)
        for family in ("mixtral", "switch_transformers")
    )
    jobs = [replace(job, num_steps=2) for job in made]
    jobs.append(replace(jobs[0], name="int8", options=jobs[0].options | {"wire": "int8"}))
    tagged, by_channels = (ranks.run(num_ranks, jobs, tmp_path / str(way), by_channels=way) for way in (False, True))
    assert by_channels == tagged
    for job in jobs:
        one, other = (reference.state(reference.load(tmp_path / str(way) / job.name)) for way in (False, True))
        assert all(torch.equal(one[name], other[name]) for name in one), job.name


def test_every_family_is_trained_by_four_processes_in_one_of_the_tests() -> None:
    assert {*EMULATED, *ALSO_EMULATED} == {*FAMILIES}


def test_encoded_hidden_states_leave_losses_within_one_percent(tmp_path: Path) -> None:
    jobs = []
    for family, dtype, wires in (("switch_transformers", "fp32", WIRES), ("mixtral", "bf16", ["int8"])):
        plain = make_job(family, tmp_path, 6, accelerator="host", num_stages=6, dtype=dtype)
        for wire in (None, *wires):
            options = plain.options | {"wire": wire}
            jobs.append(replace(plain, name=f"{family}-{wire}", num_steps=3, options=options))
    losses = ranks.run(2, jobs, tmp_path / "out")
    for name, encoded in losses.items():
        plain = losses[f"{name.rpartition('-')[0]}-None"]
        if not name.endswith("None"):
            assert encoded == pytest.approx(plain, rel=1e-2), name
            assert encoded != pytest.approx(plain, rel=1e-6), name


def test_dropout_draws_the_same_numbers_in_one_process_and_in_two(tmp_path: Path) -> None:
    dropouts = {"mixtral": {"attention_dropout": 0.3}, "nllb-moe": {"dropout": 0.3, "moe_token_dropout": 0.2}}
    jobs = []
    for family, dropout in dropouts.items():
        write_tiny_checkpoint(family, tmp_path / family, 0, "fp32", **layers(family, 4), **dropout)
        options = {"accelerator": "host", "num_stages": 4, **OPTIMIZER}
        jobs.append(ranks.Job(name=family, model=str(tmp_path / family), num_steps=NUM_STEPS, options=options))
    jobs.append(replace(jobs[-1], name="in flights", options=jobs[-1].options | {"num_in_flight": 2}))
    losses = ranks.run(2, jobs, tmp_path / "out")
    for job in jobs:
        alone = []
        steps, options = steps_of(job), SessionOptions(accelerator="host", **OPTIMIZER)
        with Session(Path(job.model), options, steps[0], Recorder(enabled=False)) as session:
            before = reference.state(reference.load(Path(job.model)))
            for number, batches in enumerate(steps, start=1):
                alone.append(session.train_step(batches, step=number, learning_rate=ranks.LEARNING_RATE).loss)
            alone.append(session.evaluate(steps[0]))
            output = tmp_path / f"alone-{job.name}"
            output.mkdir()
            write_final(session, output, Path(job.model))
        wanted = reference.Reference(alone[:NUM_STEPS], before, reference.state(reference.load(output)))
        compare(job, losses[job.name], tmp_path / "out" / job.name, wanted)
        assert losses[job.name][-1] == pytest.approx(alone[-1], rel=1e-5)
