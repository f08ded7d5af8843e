"""Twins from scratch: the same first weights, batches and steps; both learn; what cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.decoupling.conftest import WORDS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from isthmus.decoupling.pretraining import IGNORED, mask_tokens, pretrain
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import PretrainReport
from isthmus.spec.serialization import from_json

SIZES: dict[str, dict[str, Any]] = {
    "bert": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
    ),
    "llama": dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    ),
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=32),
}


def config(family: str, tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "base.json"
    path.write_text(json.dumps({"model_type": family, "vocab_size": 300, **SIZES[family], **fields}))
    return path


def run(path: Path, text: Path, output: Path, **options: Any) -> PretrainReport:
    fast: dict[str, Any] = dict(steps=60, batch_tokens=256, seq_len=32, dtype="fp32", device="cpu", plain=True)
    report = pretrain(path, data=[text], output=output, **{**fast, "sub_blocks": 2, **options})
    assert report is not None
    return report


@pytest.mark.parametrize("family", SIZES)
def test_twins_learn_and_load(family: str, text: Path, tmp_path: Path) -> None:
    report = run(config(family, tmp_path), text, tmp_path / "out")
    assert [twin.num_sub_blocks for twin in report.twins] == [1, 2]
    for twin in report.twins:
        assert twin.curve[-1].step == 60 and twin.curve[-1].loss < twin.curve[0].loss - 0.5
    assert report.twins[0].curve[-1].num_tokens == report.twins[1].curve[-1].num_tokens
    assert from_json(PretrainReport, (tmp_path / "out" / "report.json").read_text()) == report
    auto_class = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    for name, prefix in (("original", ""), ("decoupled", "decoupled_")):
        assert auto_class.from_pretrained(tmp_path / "out" / name).config.model_type == prefix + family


def test_twins_begin_with_the_same_weights(text: Path, tmp_path: Path) -> None:
    run(config("llama", tmp_path), text, tmp_path / "out", steps=1, learning_rate=1e-12)
    original, decoupled = (
        load_file(tmp_path / "out" / name / "model.safetensors") for name in ("original", "decoupled")
    )
    assert original.keys() == decoupled.keys()
    for name, tensor in original.items():
        torch.testing.assert_close(decoupled[name], tensor, rtol=0, atol=1e-9)


def test_masks_are_those_of_bert() -> None:
    torch.manual_seed(0)
    input_ids = torch.randint(10, 1000, (64, 200))
    input_ids[:, 0] = 2
    mask = torch.ones_like(input_ids)
    mask[:, 150:] = 0
    before = input_ids.clone()
    batch = {"input_ids": input_ids, "attention_mask": mask}
    targets = mask_tokens(batch, 4, [0, 2, 3, 4], 1000, torch.Generator().manual_seed(1))
    chosen = targets != IGNORED
    assert torch.equal(targets[chosen], before[chosen])
    assert torch.equal(input_ids[~chosen], before[~chosen])
    assert not chosen[:, 0].any() and not chosen[:, 150:].any()
    assert abs(chosen[:, 1:150].float().mean() - 0.15) < 0.01
    assert abs((input_ids[chosen] == 4).float().mean() - 0.8) < 0.02
    assert abs((input_ids[chosen] == before[chosen]).float().mean() - 0.1) < 0.02


def test_what_cannot_work_is_refused(text: Path, tmp_path: Path) -> None:
    path = config("bert", tmp_path)
    with pytest.raises(IsthmusError, match=r"config: cannot read .*nothing.json .*; wanted a Hugging Face config.json"):
        run(tmp_path / "nothing.json", text, tmp_path / "out")
    with pytest.raises(IsthmusError, match=r"vocab_size: got 100, wanted at least 259"):
        run(config("bert", tmp_path, vocab_size=100), text, tmp_path / "out")
    with pytest.raises(IsthmusError, match=r"sub_blocks: a hidden size of 32 cannot be cut into 5 equal slices"):
        run(path, text, tmp_path / "out", sub_blocks=5)
    assert not (tmp_path / "out" / "original").exists() and WORDS
