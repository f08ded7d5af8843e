"""``isthmus tune`` on a quantised checkpoint is ``isthmus tune`` on the dequantised one; what it writes is plain."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.integration.support import EMULATED, VOCAB_SIZE, Inputs, Tune, error_line, losses, same_weights, succeed
from tests.quantised import WRITERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.models.quantisation import METHODS


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantised checkpoint with a tokenizer, and the same dequantised by transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    quantised, plain = folder / "quantised", folder / "plain"
    WRITERS[request.param](quantised, plain, vocab_size=VOCAB_SIZE)
    for path in (quantised, plain):
        AutoTokenizer.from_pretrained(inputs.model).save_pretrained(path)
    return quantised, plain


@pytest.mark.parametrize("more", [(), ("--dtype", "bf16"), (*EMULATED, "--accelerator-memory", "8MiB")])
def test_run_equals_one_from_the_dequantised_checkpoint(
    more: tuple[str, ...], pair: tuple[Path, Path], inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    outputs = []
    for model in pair:
        outputs.append(tmp_path / model.name)
        succeed(run(inputs.arguments(outputs[-1], *more, model=model)))
    assert losses(outputs[0]) == pytest.approx(losses(outputs[1]), rel=1e-5 if "emulated" in more else 0)
    assert "emulated" in more or same_weights(*outputs)
    assert "quantization_config" not in json.loads((outputs[0] / "config.json").read_text())
    module = AutoModelForCausalLM.from_pretrained(outputs[0])
    assert {parameter.dtype for parameter in module.parameters()} == {
        torch.bfloat16 if "bf16" in more else torch.float32
    }


def test_resumed_run_equals_an_uninterrupted_one(
    pair: tuple[Path, Path],
    inputs: Inputs,
    run: Tune,
    tmp_path: Path,
    after_step: Callable[[int, Callable[[], object]], None],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(run(inputs.arguments(whole, model=pair[0])))
    after_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    error_line(run(inputs.arguments(parts, model=pair[0])), 128 + signal.SIGTERM)
    succeed(run(inputs.arguments(parts, "--resume", model=pair[0])))
    assert losses(parts) == losses(whole) and same_weights(parts, whole)


def test_other_methods_are_refused_before_anything_is_written(
    pair: tuple[Path, Path], inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((pair[0] / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (model / "config.json").write_text(json.dumps(config))
    line = error_line(run(inputs.arguments(tmp_path / "out", model=model)))
    assert "got quant_method 'bitsandbytes', wanted one of mxfp4, fp8" in line
    assert not any((tmp_path / "out").iterdir())
