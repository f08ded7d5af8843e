"""Layers that stay original by measurement: those that are worst to decouple, and the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from isthmus.data import load_tokenizer
from isthmus.decoupling.pair import Wanted, open_source
from isthmus.decoupling.run import decouple
from isthmus.decoupling.sensitivity import most_sensitive, sensitivities
from isthmus.spec.errors import IsthmusError
from isthmus.training.batches import fixed_batches


@pytest.mark.parametrize(("groups", "layers"), [(1, (3,)), (2, (1, 3)), (3, (1, 2, 3))])
def test_the_worst_to_decouple_stay(groups: int, layers: tuple[int, ...]) -> None:
    assert most_sensitive([0.1, 0.9, 0.3, 0.2], groups) == layers


def test_not_all_can_stay() -> None:
    with pytest.raises(IsthmusError, match="groups: got 4 for 4 layers, wanted 1 to 3"):
        most_sensitive([0.1, 0.9, 0.3, 0.2], 4)


@pytest.fixture
def lopsided(encoder: Path, tmp_path: Path) -> Path:
    """The encoder with a first layer that does nothing, so that decoupling it costs nothing."""
    model: Any = BertModel.from_pretrained(encoder)
    layer = model.encoder.layer[0]
    with torch.no_grad():
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight.zero_()
            dense.bias.zero_()
    model.save_pretrained(tmp_path / "lopsided")
    load_tokenizer(encoder).save_pretrained(tmp_path / "lopsided")
    return tmp_path / "lopsided"


def test_a_layer_that_does_nothing_is_the_least_sensitive(lopsided: Path, text: Path) -> None:
    source = open_source(lopsided)
    ids = load_tokenizer(lopsided)(text.read_text().splitlines()[:60])["input_ids"]
    batches = fixed_batches([np.asarray(row, np.int32) for row in ids], 256, 0)
    errors = sensitivities(source, source.load(), Wanted(sub_blocks=2), batches)
    assert len(errors) == 3 and errors[0] < 0.7 * min(errors[1:])  # norms over a slice cost a little


def test_decouple_keeps_them_and_says_so(
    lopsided: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decouple(
        lopsided,
        output=tmp_path / "out",
        text=[text],
        sub_blocks=2,
        groups=2,
        original_layers="sensitive",
        steps=1,
        dtype="fp32",
        device="cpu",
        plain=True,
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["original_layers"] == [1, 2]
    assert "original stay 1, 2" in capsys.readouterr().err
