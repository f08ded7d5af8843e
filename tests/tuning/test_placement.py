"""Accelerator memory is divided for the largest micro-batch that can come, not for the first ones that do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.models.tiny import FAMILIES, tiny_config, write_tiny_checkpoint
from isthmus.reporting.recorder import Recorder
from isthmus.spec.units import parse_emulate
from isthmus.tuning.data import IGNORED, MicroBatch
from isthmus.tuning.data.batches import largest_micro_batch
from isthmus.tuning.preflight.blueprint import blueprint_of
from isthmus.tuning.session import Session, SessionOptions

SEQ_LEN = 24


def packed(*documents: int) -> dict[str, Tensor]:
    """One sequence of documents of these lengths, the rest padding."""
    lengths = [*documents, SEQ_LEN - sum(documents)]
    ids = torch.full((1, SEQ_LEN), 5)
    labels = ids.clone()
    labels[:, sum(documents) :] = IGNORED
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "labels": labels}


def pair(num_source: int, num_target: int) -> dict[str, Tensor]:
    ids = torch.full((1, num_source), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full((1, num_target), 5)}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_micro_batch_saves_more_than_the_largest(family: str) -> None:
    config = tiny_config(family)
    target_len = SEQ_LEN if config.is_encoder_decoder else None
    largest = largest_micro_batch(1, SEQ_LEN, target_len)
    others = [pair(24, 3), pair(7, 24)] if config.is_encoder_decoder else [packed(24), packed(9), packed(3, 8, 10)]
    most_bytes = blueprint_of(config, "fp32", largest.inputs).whole.saved_bytes
    assert [blueprint_of(config, "fp32", inputs).whole.saved_bytes <= most_bytes for inputs in others] == [
        True for _ in others
    ]


def test_room_for_activations_does_not_depend_on_padding_or_on_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    write_tiny_checkpoint("mixtral", tmp_path / "model", 0, "fp32")
    options = SessionOptions(
        accelerator="emulated",
        emulation=parse_emulate("h2d=1GB/s,d2h=1GB/s,threads=1"),
        accelerator_memory_bytes=1 << 24,
    )

    def planned_bytes(example: MicroBatch, largest: MicroBatch | None = None) -> int:
        arguments = tmp_path / "model", options, [example] * 2, Recorder(enabled=False)
        with Session(*arguments, largest=largest) as session:
            return session.plan.activation_bytes

    full, one = (MicroBatch(packed(*documents), SEQ_LEN, SEQ_LEN - 2) for documents in ((12, 12), (24,)))
    padded = replace(full, inputs=packed(6, 6), num_tokens=12, num_label_tokens=10)
    most_bytes = planned_bytes(full)
    assert planned_bytes(padded) == most_bytes
    assert planned_bytes(one) < most_bytes == planned_bytes(one, largest_micro_batch(1, SEQ_LEN))
