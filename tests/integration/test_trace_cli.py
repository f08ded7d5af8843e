"""``isthmus trace`` from end to end: what is recorded is what a run routes, and simulations take it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.integration.support import Inputs, Tune, error_line, succeed
from transformers import LlamaConfig

import isthmus
from isthmus.models.config import load_config, model_spec
from isthmus.models.tiny import FAMILIES, tiny_config, write_tiny_checkpoint
from isthmus.planning.popularity_trace import read_trace
from isthmus.simulation.tuning.clusters import a800
from isthmus.spec.serialization import to_json

SIZE = ("--seq-len", "32", "--micro-batches", "2", "--dtype", "fp32", "--steps", "3")


def arguments(inputs: Inputs, output: Path, *more: str, model: Path | None = None) -> list[str]:
    return ["trace", str(model or inputs.model), "--data", str(inputs.data), "--output", str(output), *SIZE, *more]


@pytest.fixture
def small_cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.json"
    path.write_text(to_json(a800(1, 1)))
    return path


def test_a_recorded_trace_can_be_simulated(inputs: Inputs, run: Tune, tmp_path: Path, small_cluster: Path) -> None:
    output = tmp_path / "new" / "popularity.npz"
    result = run(arguments(inputs, output))
    succeed(result)
    found = read_trace(output)
    spec = model_spec(load_config(inputs.model))
    found.check(spec)
    assert found.counts.shape == (3, 2, 4)
    # Every token of every sequence, padding too, chooses two experts in every layer.
    assert (found.counts.sum(axis=-1) == 2 * 32 * 2).all()
    said = result.stdout
    for words in ("3 steps, 2 MoE layers", "layers 0 to 0: G = 0.", "all: G = 0.", "drift: ", "isthmus plan tune"):
        assert words in said
    assert f"all: G = {found.skewness_L.mean():.3f}" in said
    simulate = ["simulate", "tune", "--model", str(inputs.model), "--cluster", str(small_cluster), "--batch", "4"]
    succeed(run([*simulate, "--policies", "mobius", "--popularity", str(output)]))


def test_a_trace_has_the_counts_of_a_run_with_the_same_data(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    succeed(run(arguments(inputs, tmp_path / "traced.npz")))
    # Without learning all steps meet the same routers.
    learning = ("--learning-rate", "0", "--trace", str(tmp_path / "tuned.npz"), "--steps", "3")
    succeed(run(inputs.arguments(tmp_path / "out", *learning)))
    traced, tuned = read_trace(tmp_path / "traced.npz"), read_trace(tmp_path / "tuned.npz")
    assert (traced.counts == tuned.counts).all() and traced.model == tuned.model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced(family: str, inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny_checkpoint(family, model, 0, "bf16", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs.model / name, model)
    data = inputs.data
    if tiny_config(family).is_encoder_decoder:
        data = tmp_path / "pairs.jsonl"
        data.write_text('{"prompt": "an isthmus", "completion": "joins two lands"}\n' * 6)
    more = ("--data", str(data), "--dtype", "bf16", "--steps", "2", "--micro-batches", "3")
    succeed(run(arguments(inputs, tmp_path / "t.npz", *more, model=model)))
    found = read_trace(tmp_path / "t.npz")
    found.check(model_spec(load_config(model)))
    assert (found.counts.sum(axis=-1) > 0).all()
    assert np.all(found.skewness_L >= 1 / np.array(found.num_experts) - 1e-9)


def test_input_that_cannot_work_is_one_line(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    output = tmp_path / "t.npz"
    dense = tmp_path / "dense"
    LlamaConfig(num_hidden_layers=1).save_pretrained(dense)
    file = tmp_path / "file"
    file.write_text("")
    for wrong, message in (
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--output", str(tmp_path)), "is a directory, wanted a file's name"),
        (("--output", str(file / "t.npz")), "output: nothing can be written below"),
        (("--steps", "100000"), r"sequences of 32 tokens, wanted 200000, 2 for each of 100000 steps"),
        (("--num-layers", "3"), "num_layers: got 3, wanted 1 to 2"),
    ):
        assert message in error_line(run(arguments(inputs, output, *wrong)))
    assert "has no routed experts" in error_line(run(arguments(inputs, output, model=dense)))
    line = error_line(run(inputs.arguments(tmp_path / "out", "--trace", str(file / "t.npz"))))
    assert "trace: nothing can be written below" in line
    assert not output.exists()


def test_help_teaches(run: Tune) -> None:
    said = " ".join(run(["trace", "--help"]).stdout.split())
    for words in ("Record which experts", "isthmus plan tune ./my-model", "FILE.npz", "isthmus simulate tune"):
        assert words in said


def test_it_can_be_called_from_python(inputs: Inputs, tmp_path: Path) -> None:
    found = isthmus.trace(inputs.model, data=inputs.data, output=tmp_path / "t.npz", seq_len=32, steps=1, plain=True)
    assert found.counts.shape == (1, 2, 4)
