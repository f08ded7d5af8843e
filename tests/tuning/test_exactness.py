"""Whatever runs where, training is the same computation as plain transformers with torch.optim.AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import torch

from isthmus.models.tiny import FAMILIES, write_tiny_checkpoint
from isthmus.reporting.recorder import Recorder
from isthmus.tuning.run import write_final
from isthmus.tuning.session import Session, SessionOptions
from isthmus.units import parse_emulate

LEARNING_RATE = 1e-3
POLICIES = ("affinity", "paper", "mobius", "gpipe-offload", "cpu-experts", "resident")
EMULATED = {
    "accelerator": "emulated",
    "emulation": parse_emulate("h2d=200MB/s,d2h=200MB/s,threads=1"),
    "accelerator_memory_bytes": 1_350_000,
}


def compare(
    path: Path,
    output: Path,
    options: SessionOptions,
    *,
    num_steps: int = 20,
    loss_tolerance: float = 1e-5,
    update_tolerance: float | None = 1e-4,
) -> None:
    """Trains both ways on the same batches and compares losses and final weights."""
    config = reference.AutoConfig.from_pretrained(path)
    steps = reference.random_steps(
        num_steps, 3, vocab_size=config.vocab_size, is_encoder_decoder=config.is_encoder_decoder
    )
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    wanted = reference.train(
        path, steps, learning_rate=LEARNING_RATE, clip_norm=options.clip_norm, weight_decay=options.weight_decay, dtype=dtype
    )
    losses = []
    with Session(path, options, steps[0], Recorder(enabled=False)) as session:
        for number, batches in enumerate(steps, start=1):
            losses.append(session.train_step(batches, step=number, learning_rate=LEARNING_RATE).loss)
        write_final(session, output, path)
        assert session.accelerator.peak_bytes <= session.accelerator.budget_bytes
    for number, (got, want) in enumerate(zip(losses, wanted.losses, strict=True)):
        assert got == pytest.approx(want, rel=loss_tolerance), f"loss of step {number + 1}"
    if update_tolerance is None:
        return
    after = reference.state(reference.load(output))
    assert after.keys() == wanted.after.keys()
    difference = sum(float((after[name] - tensor).square().sum()) for name, tensor in wanted.after.items())
    update = sum(float((wanted.after[name] - tensor).square().sum()) for name, tensor in wanted.before.items())
    assert difference**0.5 <= update_tolerance * update**0.5


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "model"
    write_tiny_checkpoint(getattr(request, "param", "mixtral"), path, 0, "fp32")
    return path


@pytest.mark.parametrize("checkpoint", FAMILIES, indirect=True)
def test_every_family_trains_as_plain_transformers_in_place(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compare(checkpoint, tmp_path / "out", SessionOptions(accelerator="host", weight_decay=0.01))
