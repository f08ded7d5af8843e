"""``isthmus decouple``: the copy follows the original, loads, resumes exactly, and refuses what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.decoupling.conftest import sentences, tokenizer
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, DistilBertConfig, DistilBertModel
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.decoupling.run import decouple
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import DecoupleReport
from isthmus.spec.serialization import from_json

pytestmark = pytest.mark.filterwarnings("ignore:.*set_num_threads.*")
FAST: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "batch_tokens": 256, "plain": True}


def run(model: Path, output: Path, text: Path, **options: Any) -> DecoupleReport:
    report = decouple(model, output=output, text=[text], **{**FAST, "sub_blocks": 2, "steps": 60, **options})
    assert report is not None
    return report


def test_copy_of_an_encoder_comes_closer_and_loads(encoder: Path, text: Path, tmp_path: Path) -> None:
    report = run(encoder, tmp_path / "out", text, init="plain")
    first, last = report.curve[0], report.curve[-1]
    assert last.step == 60 and (last.cosine or 0) > (first.cosine or 1) + 0.1
    assert from_json(DecoupleReport, (tmp_path / "out" / "report.json").read_text()) == report
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "DecoupledBertModel"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_type"] == "bert" and config["original_layers"] == [2]
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_fitted_slices_begin_closer_than_plain_ones(encoder: Path, text: Path, tmp_path: Path) -> None:
    reports = [
        run(encoder, tmp_path / initialisation, text, init=initialisation, steps=2)
        for initialisation in ("fitted", "plain")
    ]
    fitted, plain = (report.curve[0].cosine or 0.0 for report in reports)
    assert fitted > plain + 0.05


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_copy_of_a_decoder_comes_closer(decoder: Path, text: Path, tmp_path: Path, dtype: str) -> None:
    report = run(decoder, tmp_path / "out", text, seq_len=32, dtype=dtype)
    first, last = report.curve[0], report.curve[-1]
    assert (last.divergence or 1) < 0.8 * (first.divergence or 0) and last.original_loss == first.original_loss
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "DecoupledLlamaForCausalLM"


@pytest.mark.parametrize("options", [{"widths": [1, 3]}, {"heads": "own"}, {"original_layers": [0]}])
def test_other_forms_are_distilled_too(encoder: Path, text: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    report = run(encoder, tmp_path / "out", text, init="plain", **options)
    assert (report.curve[-1].cosine or 0) > (report.curve[0].cosine or 1)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def test_resumed_run_is_the_one_that_was_never_stopped(
    encoder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(encoder, tmp_path / "whole", text, steps=24)
    from isthmus.decoupling.trainer import Trainer

    take_step = Trainer._take_step

    def stop_at_ten(trainer: Trainer) -> None:
        take_step(trainer)
        if trainer.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", stop_at_ten)
        with pytest.raises(IsthmusError, match=r"stopped by SIGTERM after step 10; its state is saved. Continue with"):
            run(encoder, tmp_path / "parts", text, steps=24)
    parts = run(encoder, tmp_path / "parts", text, steps=24, resume=True)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [(point.step, point.loss) for point in parts.curve] == [(point.step, point.loss) for point in whole.curve]


def test_minutes_become_steps_and_stay_so_when_resumed(encoder: Path, text: Path, tmp_path: Path) -> None:
    report = run(encoder, tmp_path / "out", text, steps=None, minutes=0.02)
    assert report.config["num_steps"] == report.curve[-1].step > 10


def test_patience_ends_a_run_that_gets_no_better(encoder: Path, text: Path, tmp_path: Path) -> None:
    report = run(encoder, tmp_path / "out", text, learning_rate=1e-9, patience=2)
    assert report.curve[-1].step < 60


def test_small_corpus_is_warned_of_with_its_number(
    encoder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(encoder, tmp_path / "out", text, steps=2)
    assert "tokens are few to distil on" in capsys.readouterr().err


def test_two_processes_train_one_model(encoder: Path, text: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom isthmus.decoupling.run import decouple\n"
        f"decouple({str(encoder)!r}, output={str(tmp_path / 'out')!r}, text=[{str(text)!r}], sub_blocks=2, steps=40, "
        "dtype='fp32', device='cpu', batch_tokens=128, plain=True)"
    )
    (tmp_path / "script.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([*torchrun, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    curve = json.loads((tmp_path / "out" / "report.json").read_text())["curve"]
    assert curve[-1]["step"] == 40 and curve[-1]["cosine"] > curve[0]["cosine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sub_blocks": 3}, r"sub_blocks: a hidden size of 32 cannot be cut into 3 equal slices; .* --widths 1,1,1"),
        ({"groups": 4}, r"groups: got 4 for 3 layers, wanted at most 1"),
        ({"groups": 3}, r"groups: got 3 for 3 layers: every group ends with an original layer, so none would be"),
        ({"original_layers": [7]}, r"original_layers: got 7, wanted layers from 0 to 2"),
        ({"widths": [1, 1, 2]}, r"widths: got 3 shares, wanted 2, one a sub-block"),
        ({"heads": "own", "sub_blocks": 8}, r"sub_blocks: 4 attention heads cannot be shared out evenly among 8"),
        ({"steps": None, "minutes": -1.0}, r"minutes: got -1, wanted more than 0"),
        ({"init": "good"}, r"init: got 'good', wanted fitted or plain"),
        ({"learning_rate": 0.0}, r"learning_rate: got 0, wanted more than 0"),
    ],
)
def test_what_cannot_work_is_refused(
    encoder: Path, text: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(IsthmusError, match=message):
        run(encoder, tmp_path / "out", text, **options)


def test_models_that_cannot_be_decoupled_are_refused(encoder: Path, text: Path, tmp_path: Path) -> None:
    run(encoder, tmp_path / "out", text, steps=2)
    with pytest.raises(IsthmusError, match=r"model: is already decoupled, into 2 sub-blocks; wanted the original"):
        run(tmp_path / "out", tmp_path / "again", text)
    other = tmp_path / "distilbert"
    DistilBertModel(DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=40)).save_pretrained(
        other
    )
    tokenizer().save_pretrained(other)
    with pytest.raises(IsthmusError, match=r"model: a 'distilbert' cannot be decoupled; wanted one of bert"):
        run(other, tmp_path / "again", text)
    with pytest.raises(FileNotFoundError, match="is not a directory, wanted a checkpoint directory"):
        run(tmp_path / "nothing", tmp_path / "again", text)


def test_too_little_text_and_used_outputs_are_refused(encoder: Path, text: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("ban ker\nlis mot\n")
    with pytest.raises(IsthmusError, match=r"text: .*few.txt gives 2 lines, wanted at least 16"):
        run(encoder, tmp_path / "out", few)
    run(encoder, tmp_path / "out", text, steps=2)
    with pytest.raises(IsthmusError, match=r"already holds a run. Add --resume to continue it, --overwrite"):
        run(encoder, tmp_path / "out", text, steps=2)
    run(encoder, tmp_path / "out", text, steps=2, overwrite=True)
    with pytest.raises(IsthmusError, match=r"steps: got 1, but 2 are done already"):
        run(encoder, tmp_path / "out", text, steps=1, resume=True)


def test_another_models_checkpoint_is_not_resumed(encoder: Path, text: Path, tmp_path: Path) -> None:
    run(encoder, tmp_path / "out", text, steps=2)
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    config = BertConfig.from_pretrained(encoder)
    config.intermediate_size = 48
    BertModel(config).save_pretrained(other)
    with pytest.raises(IsthmusError, match=r"resume: .* is of another model; resume with the one that wrote it"):
        run(other, tmp_path / "out", text, steps=4, resume=True)


def test_nothing_is_dropped_out_while_distilling(encoder: Path, text: Path, tmp_path: Path) -> None:
    dropping = tmp_path / "dropping"
    shutil.copytree(encoder, dropping)
    config = json.loads((dropping / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    (dropping / "config.json").write_text(json.dumps(config))
    run(encoder, tmp_path / "a", text, steps=3)
    run(dropping, tmp_path / "b", text, steps=3)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_demo_trains_and_decouples_a_small_model(tmp_path: Path) -> None:
    runner = CliRunner().invoke(
        app, ["demo", "--only", "decouple", "--decouple-minutes", "0.05", "--output", str(tmp_path)]
    )
    assert runner.exit_code == 0, runner.output
    report = from_json(DecoupleReport, (tmp_path / "decouple" / "decoupled" / "report.json").read_text())
    assert (report.curve[-1].divergence or 1) < (report.curve[0].divergence or 0)
    assert (tmp_path / "decouple" / "decoupled" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert "One request of 128 tokens" in " ".join(runner.output.split())


def test_fidelity_is_measured_on_the_text_that_is_given(encoder: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(sentences(20, seed=7)))
    report = run(encoder, tmp_path / "out", text, steps=1, eval_text=[other])
    assert report.config["num_held_out"] == 20
    other.write_text("ban ber\n")
    with pytest.raises(IsthmusError, match=r"eval_text: .*other\.txt gives 1 texts, wanted at least 4"):
        run(encoder, tmp_path / "new", text, steps=1, eval_text=[other])
