"""``isthmus tune`` from end to end on one machine: what it leaves behind, and what it says to input that cannot
work."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests import reference
from tests.integration.support import (
    EMULATED,
    Inputs,
    Tune,
    error_line,
    losses,
    poisoned,
    report,
    same_weights,
    succeed,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import isthmus
from isthmus.data import load_tokenizer, train_tokenizer
from isthmus.training.checkpoints import find_resumable
from isthmus.tuning.data import BatchStream, load_dataset

STEP_FIELDS = (
    "step loss num_tokens duration_s bound_s h2d_bytes d2h_bytes num_experts_on_cpu num_experts_on_accelerator "
    "optimizer_s"
)
SUMMARY_FIELDS = (
    "tokens_per_s bound_share peak_accelerator_bytes accelerator_budget_bytes peak_host_bytes predictor_token_accuracy"
)
PICTURES = ("timeline.png", "popularity.png", "loss.png")


def minimum_bytes(run: Tune, arguments: list[str]) -> str:
    """What a run with next to no memory says that it needs."""
    line = error_line(run([*arguments, "--accelerator-memory", "1kB"]))
    found = re.search(r"accelerator_memory: 1000 bytes are under the minimum of (\d+) ", line)
    assert found, line
    return found[1]


def check_outputs(output: Path) -> None:
    content = report(output)
    assert content["schema_version"] == 1
    assert content["kind"] == "tune"
    assert content["config"]["seq_len"] == 32
    assert content["environment"]
    assert [step["step"] for step in content["steps"]] == list(range(1, len(content["steps"]) + 1))
    for step in content["steps"]:
        assert set(STEP_FIELDS.split()) <= step.keys()
    assert set(SUMMARY_FIELDS.split()) <= content["summary"].keys()
    assert json.loads((output / "timeline.json").read_text())["traceEvents"]
    for name in PICTURES:
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def evaluation_loss(output: Path, data: Path) -> float:
    """By plain transformers, on all of ``data``."""
    dataset = load_dataset(data, load_tokenizer(output), seq_len=32)
    model = reference.load(output).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for step in BatchStream(dataset).evaluation_batches():
            for batch in step:
                loss = model(**batch.inputs, output_router_logits=True).loss
                total, count = total + float(loss) * batch.num_label_tokens, count + batch.num_label_tokens
    return total / count


def test_host_run_learns_and_leaves_a_model_that_loads_with_report_and_pictures(
    inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere.json"
    evaluating = ("--eval-data", str(inputs.eval_data), "--eval-every", "10", "--eval-batches", "1000")
    succeed(run(inputs.arguments(output, "--steps", "20", "--report", str(elsewhere), *evaluating)))
    check_outputs(output)
    assert json.loads(elsewhere.read_text()) == report(output)
    found = losses(output)
    assert sum(found[-4:]) < sum(found[:4]) - 1
    evaluated = {step["step"]: step["evaluation_loss"] for step in report(output)["steps"] if step["evaluation_loss"]}
    assert evaluated.keys() == {10, 20}
    assert evaluated[20] < evaluated[10]
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("import os", return_tensors="pt")
    with torch.no_grad():
        assert model(**prompt).logits.shape[-1] == model.config.vocab_size
    assert evaluation_loss(output, inputs.eval_data) == pytest.approx(evaluated[20], rel=1e-4)


@pytest.mark.parametrize("policy", ["affinity", "mobius", "resident"])
def test_emulated_run_in_exactly_the_minimum_budget_computes_what_the_host_does(
    policy: str, inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    host, output = tmp_path / "host", tmp_path / "emulated"
    succeed(run(inputs.arguments(host)))
    arguments = inputs.arguments(output, *EMULATED, "--policy", policy)
    minimum = minimum_bytes(run, arguments)
    succeed(run([*arguments, "--accelerator-memory", minimum]))
    check_outputs(output)
    assert losses(output) == pytest.approx(losses(host), rel=1e-5)
    summary = report(output)["summary"]
    assert 0 < summary["peak_accelerator_bytes"] <= summary["accelerator_budget_bytes"] == int(minimum)
    assert all(step["h2d_bytes"] > 0 for step in report(output)["steps"])


def test_a_byte_less_than_the_minimum_is_too_little(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    arguments = inputs.arguments(tmp_path / "out", *EMULATED)
    minimum = minimum_bytes(run, arguments)
    line = error_line(run([*arguments, "--accelerator-memory", str(int(minimum) - 1)]))
    assert f"under the minimum of {minimum}" in line


def test_activations_that_do_not_all_fit_are_kept_flight_by_flight(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    host, output = tmp_path / "host", tmp_path / "out"
    succeed(run(inputs.arguments(host)))
    arguments = inputs.arguments(output, *EMULATED)
    for_all = minimum_bytes(run, [*arguments, "--micro-batches-in-flight", "2"])
    memory = ["--accelerator-memory", str(int(for_all) - 1)]
    line = error_line(run([*arguments, *memory, "--micro-batches-in-flight", "2"]))
    assert "activations of 2 micro-batches" in line and "--micro-batches-in-flight" in line
    result = run([*arguments, *memory])
    succeed(result)
    assert "at most 1 of 2 micro-batches in flight: activations of more do not fit" in result.stderr
    assert losses(output) == pytest.approx(losses(host), rel=1e-5)
    assert report(output)["summary"]["micro_batches_in_flight"] == 1
    assert report(host)["summary"]["micro_batches_in_flight"] == 2


def test_tune_in_python_returns_the_report_that_it_writes(inputs: Inputs, tmp_path: Path) -> None:
    options = {"seq_len": 32, "micro_batches": 1, "steps": 2, "dtype": "bf16", "accelerator": "host", "plain": True}
    result = isthmus.tune(inputs.model, data=inputs.data, output=tmp_path / "out", **options)
    assert [step.loss for step in result.steps] == losses(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# --- input that cannot work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-layers", "3"], r"num_layers: got 3, wanted 1 to 2"),
        (["--micro-batches-in-flight", "3"], r"micro_batches_in_flight: got 3, wanted a whole number from 1 to 2, the"),
        (["--accelerator", "emulated", "--accelerator-memory", "1GiB"], r"say --emulate h2d=2GB/s"),
        ([*EMULATED], r"say --accelerator-memory 8GiB"),
        ([*EMULATED, "--accelerator-memory", "lots"], r"accelerator_memory: got 'lots', wanted a size"),
        ([*EMULATED, "--accelerator-memory", "0"], r"accelerator_memory: got '0', wanted more than 0 bytes"),
        (["--emulate", "h2d=fast"], r"emulate h2d: got 'fast', wanted a rate"),
        ([*EMULATED, "--accelerator-memory", "1GiB", "--num-stages", "3"], r"stages: got 3.* 2"),
        (["--cpu-speed", "0"], r"cpu_speed: got 0\.0, wanted a fraction above 0"),
        (["--learning-rate", "-1"], r"learning_rate: got -1\.0, wanted"),
        (["--learning-rate", "nan"], r"learning_rate: got nan, wanted"),
        (["--warmup", "1.5"], r"warmup: got 1\.5, want"),
        (["--seed", "-1"], r"seed: got -1, wanted 0 or more"),
        (["--seq-len", "1"], r"seq_len: got 1, wanted at least"),
        (["--columns", "a,b,c"], r"columns: got 'a,b,c', wanted"),
        (
            ["--backend", "nccl", "--accelerator", "host"],
            r"backend: got nccl, which is for GPUs, with",
        ),
        (["--resume", "--overwrite"], r"resume, overwrite: got both"),
        (["--eval-data", "nowhere.jsonl"], r"data: nowhere\.jsonl does not exist"),
    ],
)
def test_bad_option_is_one_clear_line(more: list[str], message: str, inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    assert re.search(message, error_line(run(inputs.arguments(tmp_path / "out", *more))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_clear_line(inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    line = error_line(run(inputs.arguments(tmp_path / "out", "--accelerator", "cuda")))
    assert "no CUDA device" in line and "--accelerator host" in line


@pytest.mark.parametrize(
    ("option", "choice"),
    [
        ("--policy", "affinity"),
        ("--accelerator", "emulated"),
        ("--dtype", "bf16"),
        ("--wire", "int8"),
        ("--backend", "nccl"),
    ],
)
def test_unknown_choice_is_refused_with_the_choices(
    option: str, choice: str, inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    result = run(inputs.arguments(tmp_path / "out", option, "magic"))
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert option in result.stderr and "'magic'" in result.stderr and choice in result.stderr
    with pytest.raises(ValueError, match=f"{option[2:]}: got 'magic', wanted one of .*{choice}"):
        isthmus.tune(inputs.model, data=inputs.data, output=tmp_path / "out", **{option[2:]: "magic"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', r"a\.jsonl:2 has the fields body, wanted .*--columns"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": 3}\n', r"a\.jsonl:3: the field text is of type int, wanted text"),
        ("a.jsonl", '{"text": "one"}\n{"text": "tw\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", '{"text": ""}\n', r"a\.jsonl has nothing to predict"),
        ("a.txt", "", r"a\.txt has nothing to predict"),
        ("a.bin", "text\n", r"a\.bin has the suffix \.bin, wanted one of"),
        ("a.csv", "text\n", r"a\.csv is empty, wanted at least one record"),
    ],
)
def test_bad_data_names_the_line(
    name: str, content: str, message: str, inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    assert re.search(message, error_line(run(inputs.arguments(tmp_path / "out", data=tmp_path / name))))


def dense_model(folder: Path) -> str:
    LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return r"model: .*'llama'.* has no routed experts .*wanted a Mixture-of-Experts model"


def without_shard(folder: Path) -> str:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return r"model-00002-of-\d+\.safetensors is missing"


def truncated(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return r"model\.safetensors .*truncated"


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return r"has neither model\.safetensors nor"


def without_tokenizer(folder: Path) -> str:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return r"holds no tokenizer that can be loaded"


def other_tokenizer(folder: Path) -> str:
    train_tokenizer(["import os, sys, json\n" * 9, *map(str, range(999))], 600).save_pretrained(folder)
    return r"tokenizer: .* makes token \d+ .*vocab_size is 300"


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return r"has no config\.json"


def not_there(folder: Path) -> str:
    shutil.rmtree(folder)
    return r"is not a directory, wanted a checkpoint directory"


@pytest.mark.parametrize(
    "break_it",
    [
        dense_model,
        without_shard,
        truncated,
        without_weights,
        without_tokenizer,
        other_tokenizer,
        without_config,
        not_there,
    ],
)
def test_bad_model_is_one_clear_line(
    break_it: Callable[[Path], str], inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(inputs.model, copy)
    message = break_it(copy)
    text = tmp_path / "digits.txt"
    text.write_text(" ".join(map(str, range(999))))
    line = error_line(run(inputs.arguments(tmp_path / "out", model=copy, data=text)))
    assert re.search(message, line), line


# --- an output directory that is not empty -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to be copied, not written to."""
    output = tmp_path_factory.mktemp("finished") / "out"
    options = {"seq_len": 32, "micro_batches": 1, "steps": 2, "dtype": "fp32", "accelerator": "host", "plain": True}
    isthmus.tune(inputs.model, data=inputs.data, output=output, **options)
    return output


def files(folder: Path) -> dict[str, str]:
    """Digests: where whole contents differ, pytest would spend minutes on showing how."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_finished_run_is_not_touched_without_being_asked(
    finished: Path, inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    before = files(finished)
    assert "Add --resume to continue it, --overwrite to replace it" in error_line(run(inputs.arguments(finished)))
    # Asked, but with input that cannot work.
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "is empty" in error_line(run(inputs.arguments(finished, "--overwrite", data=empty)))
    small = [*EMULATED, "--accelerator-memory", "1kB"]
    assert "under the minimum" in error_line(run(inputs.arguments(finished, "--overwrite", *small)))
    assert files(finished) == before


def test_overwrite_leaves_nothing_of_the_run_before(finished: Path, inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    output, fresh = tmp_path / "out", tmp_path / "fresh"
    shutil.copytree(finished, output)
    (output / "model-00001-of-00002.safetensors").touch()
    succeed(run(inputs.arguments(output, "--overwrite")))
    succeed(run(inputs.arguments(fresh)))
    assert files(output).keys() == files(fresh).keys()
    assert same_weights(output, fresh)


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
def test_what_is_not_a_run_is_never_written_to(option: list[str], inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    assert "holds files that are not a run's" in error_line(run(inputs.arguments(tmp_path, *option)))
    assert files(tmp_path).keys() == {"thesis.tex"}
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_input_is_never_overwritten(finished: Path, inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    data = Path(shutil.copy(inputs.data, output / "train.jsonl"))
    before = files(output)
    for arguments in (
        inputs.arguments(output, "--overwrite", model=output),
        inputs.arguments(output, "--resume", model=output),
        inputs.arguments(output, "--overwrite", data=data),
    ):
        assert "which this run reads; name another directory" in error_line(run(arguments))
    assert files(output) == before


def test_output_that_is_a_file_is_refused(inputs: Inputs, run: Tune) -> None:
    assert "is a file; name a directory" in error_line(run(inputs.arguments(inputs.data)))


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    absurd = ("--learning-rate", "1e38", "--schedule", "constant", "--warmup", "0", "--save-every", "1")
    line = error_line(run(inputs.arguments(output, *absurd)))
    assert re.search(r"step 2: the loss is nan; .*step-00000001, the state after step 1, is kept\.", line), line
    assert find_resumable(output, notify=pytest.fail) == output / "checkpoints" / "step-00000001"
    assert not (output / "config.json").exists()


@pytest.mark.parametrize("more", [[], ["--eval-data"]])
def test_model_that_is_not_finite_is_not_trained(more: list[str], inputs: Inputs, run: Tune, tmp_path: Path) -> None:
    model = poisoned(inputs.model, tmp_path / "poisoned")
    evaluating = [*more, str(inputs.eval_data)] if more else []
    line = error_line(run(inputs.arguments(tmp_path / "out", *evaluating, model=model)))
    what = "step 0: the evaluation loss is nan" if more else "step 1: the loss is nan"
    assert f"{what}; nothing had been saved yet" in line


# --- isthmus profile -------------------------------------------------------------------------------------------------


def test_profile_is_printed_written_and_kept(inputs: Inputs, run: Tune, tmp_path: Path, cache: Path) -> None:
    arguments = ["profile", str(inputs.model), "--seq-len", "16", "--emulate", "h2d=200MB/s,d2h=200MB/s"]
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    result = run([*arguments, "--output", str(first)])
    succeed(result)
    for words in ("one expert h32-i48-glu", "up / down, alone", "optimizer", "dense part"):
        assert words in result.stdout
    num_known = len(list(cache.rglob("*.json")))
    succeed(run([*arguments, "--output", str(again)]))
    assert json.loads(again.read_text()) == json.loads(first.read_text())
    assert len(list(cache.rglob("*.json"))) == num_known
    succeed(run([*arguments, "--output", str(again), "--refresh"]))
    assert json.loads(again.read_text()) != json.loads(first.read_text())
