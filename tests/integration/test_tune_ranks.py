"""``isthmus tune`` as several processes: the model that one makes, resumed by any number, ended if one is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integration.support import VOCAB_SIZE, Inputs, Tune, losses, report, succeed
from transformers import AutoModelForCausalLM

from isthmus.models.tiny import write_tiny_checkpoint
from isthmus.reporting.chrome_trace import read_chrome_trace
from isthmus.reporting.environment import num_cpus_usable
from isthmus.training.checkpoints import read_state
from isthmus.tuning.profile import Sizes, device_to_measure, measure_blocks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def deep(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """As ``inputs``, with a model of four layers, and short documents, several to a sequence."""
    folder = tmp_path_factory.mktemp("deep")
    model, data = folder / "model", folder / "train.jsonl"
    texts = [json.loads(line)["text"] for line in inputs.data.read_text().splitlines()]
    documents = [text[start : start + 30] for text in texts for start in range(0, 3000, 30) if text[start : start + 30]]
    data.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    write_tiny_checkpoint("mixtral", model, 0, "fp32", vocab_size=VOCAB_SIZE, num_hidden_layers=4)
    for file in inputs.model.glob("*token*"):
        shutil.copy(file, model)
    return Inputs(model, data, inputs.eval_data)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def torchrun(num_ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [*command, "-m", "isthmus", *arguments], env=environment(), capture_output=True, text=True, timeout=240
    )


def start(
    commands: list[list[str]], folder: Path, port: int, own: Mapping[int, dict[str, str]] = MappingProxyType({})
) -> list[subprocess.Popen[bytes]]:
    """A process for each, without torchrun, which would end the others itself; they write ``folder / rank-<r>.log``.
    ``own``: a rank's environment."""
    shared = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    processes = []
    for rank, arguments in enumerate(commands):
        with (folder / f"rank-{rank}.log").open("wb") as log:
            command = [sys.executable, "-m", "isthmus", *arguments]
            ranked = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own.get(rank, {})
            processes.append(subprocess.Popen(command, env=ranked, stdout=log, stderr=subprocess.STDOUT))
    return processes


def end(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int | None]:
    """Exit codes, None of those that had to be killed."""
    deadline_s = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


def test_two_processes_and_then_four_make_the_model_that_one_makes(deep: Inputs, run: Tune, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    evaluation = ("--eval-data", str(deep.eval_data), "--eval-every", "2")
    succeed(run(deep.arguments(alone, *evaluation)))

    # As if it had been stopped after two of four steps, on whose number the schedule depends.
    interrupted = torchrun(2, deep.arguments(together, *evaluation, "--save-every", "2"))
    assert interrupted.returncode == 0, interrupted.stderr
    shutil.rmtree(together / "checkpoints" / "step-00000004")
    for file in ("report.json", "model.safetensors.index.json"):
        (together / file).unlink()
    resumed = torchrun(4, deep.arguments(together, *evaluation, "--resume", "--num-stages", "4"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 2" in resumed.stderr

    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    found = report(together)
    assert found["steps"][-1]["evaluation_loss"] == pytest.approx(
        json.loads((alone / "report.json").read_text())["steps"][-1]["evaluation_loss"], rel=1e-5
    )
    devices = read_chrome_trace(together / "timeline.json")
    assert len(devices) == 4 and (together / "timeline.png").exists()
    for rank, device in enumerate(devices):
        dense = {span.layer for span in device.spans if span.kind == "dense"} - {None, 4}  # 4: behind the last layer
        assert dense == {rank}
    alone_bytes = json.loads((alone / "report.json").read_text())["summary"]["needed_host_bytes"]
    assert found["summary"]["needed_host_bytes"] == pytest.approx(alone_bytes, rel=1e-2)  # nothing is kept twice
    require_same_update(deep.model, alone, together)


def require_same_update(model: Path, alone: Path, together: Path) -> None:
    """Both have changed ``model`` alike, within 1e-3 of the size of the change."""
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (alone, together)]
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    difference = sum(float((models[0][name] - models[1][name]).square().sum()) for name in before)
    update = sum(float((models[0][name] - before[name]).square().sum()) for name in before)
    assert difference**0.5 <= 1e-3 * update**0.5
    assert all(torch.isfinite(tensor).all() for tensor in models[1].values())


def slowed(profile: dict[str, Any], times: float) -> dict[str, Any]:
    """A profile, as JSON, of a device on which everything takes so many times as long."""
    experts = {
        key: {name: curve and curve | {"seconds": [s * times for s in curve["seconds"]]} for name, curve in of.items()}
        for key, of in profile["experts"].items()
    }
    rates = {name: value for name, value in profile.items() if name.endswith(("_s_per_token", "_s_per_parameter"))}
    return profile | {name: value * times for name, value in rates.items()} | {"experts": experts}


@pytest.mark.long
def test_a_process_that_measures_slower_gets_fewer_layers_and_its_run_goes_on_with_equal_stages(
    deep: Inputs, run: Tune, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, alone, together = tmp_path / "model", tmp_path / "alone", tmp_path / "together"
    write_tiny_checkpoint("mixtral", model, 0, "fp32", vocab_size=VOCAB_SIZE, num_hidden_layers=6)
    for file in deep.model.glob("*token*"):
        shutil.copy(file, model)
    few = ("--steps", "2", "--save-every", "1")
    succeed(run(deep.arguments(alone, *few, model=model)))

    # Two kinds of processes, each with a cache of its own, in which is what one of two measures here.
    caches = [tmp_path / "fast", tmp_path / "slow"]
    monkeypatch.setenv("ISTHMUS_CACHE", str(caches[0]))
    sizes, num_cores = Sizes(dtype="fp32", seq_len=32, micro_batch_size=1, micro_batches=2), num_cpus_usable() // 2
    with device_to_measure("host", {}) as device:
        measure_blocks(model, device, sizes, emulation={}, num_cores=max(1, num_cores), num_processes=2)
    shutil.copytree(caches[0], caches[1])
    for file in (caches[1] / "profiles").iterdir():
        file.write_text(json.dumps(slowed(json.loads(file.read_text()), 4.0)))
    own = {rank: {"ISTHMUS_CACHE": str(caches[rank]), "OMP_NUM_THREADS": str(rank + 1)} for rank in range(2)}
    arguments = deep.arguments(together, *few, model=model)
    assert end(start([arguments] * 2, tmp_path, port, own), timeout_s=240) == [0, 0], _said(tmp_path)
    mapping = report(together)["mapping"]
    stages = zip(mapping["stages"], mapping["ranks"], strict=True)
    slow = sum(stage["last_layer"] - stage["first_layer"] + 1 for stage, rank in stages if rank == 1)
    assert slow == 2 and len(mapping["stages"]) == 4
    assert mapping["step_s"] < 0.95 * mapping["equal_stages_step_s"]
    assert "layers: rank 0 0" in _said(tmp_path) and "shorter than stages of equal size" in _said(tmp_path)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    require_same_update(model, alone, together)

    # As if it had been stopped after one of two steps.
    shutil.rmtree(together / "checkpoints" / "step-00000002")
    for file in ("report.json", "model.safetensors.index.json"):
        (together / file).unlink()
    resumed = torchrun(2, [*arguments, "--resume", "--policy", "paper"])
    assert resumed.returncode == 0 and "resuming after step 1" in resumed.stderr, resumed.stderr
    assert report(together)["mapping"]["step_s"] is None and report(together)["mapping"]["stages"] != mapping["stages"]
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    require_same_update(model, alone, together)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_ends_the_others_which_name_it(
    signal_number: signal.Signals, deep: Inputs, tmp_path: Path, port: int
) -> None:
    output = tmp_path / "out"
    arguments = deep.arguments(output, "--steps", "100000", "--num-stages", "4", "--save-every", "1")
    processes = start([[*arguments, "--rank-timeout", "20"]] * 3, tmp_path, port)
    try:
        deadline_s = time.monotonic() + 200
        while not list(output.glob("checkpoints/step-0000000[2-9]")):
            assert time.monotonic() < deadline_s and processes[1].poll() is None, _said(tmp_path)
            time.sleep(0.1)
        processes[1].send_signal(signal_number)
        codes = end([processes[0], processes[2]], timeout_s=60)
    finally:
        end(processes, timeout_s=0)
    said = _said(tmp_path)
    assert codes == [1, 1], said
    # Each says whom it waited for: rank 1, or one that had lost rank 1 before.
    lost = "rank 1 has ended" if signal_number == signal.SIGKILL else "nothing came within 20 s"
    assert "rank 0: waited for" in said and "rank 2: waited for" in said and f"from rank 1: {lost}" in said
    assert "Traceback" not in said


def _said(folder: Path) -> str:
    return "\n".join(log.read_text() for log in sorted(folder.glob("rank-*.log")))


def test_more_stages_than_layers_are_refused_by_all(deep: Inputs, tmp_path: Path, port: int) -> None:
    processes = start([deep.arguments(tmp_path / "out", "--num-stages", "5")] * 2, tmp_path, port)
    assert end(processes, timeout_s=200) == [2, 2]
    assert _said(tmp_path).count("num_stages: got 5, wanted 1 to 4, the number of layers") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_gpus_is_refused_by_all(deep: Inputs, tmp_path: Path, port: int) -> None:
    arguments = [*deep.arguments(tmp_path / "out"), "--accelerator", "auto", "--backend", "nccl"]
    assert end(start([arguments] * 2, tmp_path, port), timeout_s=200) == [2, 2], _said(tmp_path)
    assert _said(tmp_path).count("backend: got nccl, but ranks 0, 1 without a GPU, wanted one each: say --backend") == 2


def test_processes_started_with_different_options_say_which(deep: Inputs, tmp_path: Path, port: int) -> None:
    processes = start([deep.arguments(tmp_path / "out", "--seed", seed) for seed in ("0", "1")], tmp_path, port)
    assert end(processes, timeout_s=200) == [2, 2]
    assert _said(tmp_path).count("seed: rank 1 got 1, rank 0 0; wanted the same everywhere") == 2


@pytest.mark.parametrize("what", ["dtype", "values"])
def test_processes_with_other_weights_of_the_same_configuration_are_found(
    what: str, deep: Inputs, tmp_path: Path, port: int
) -> None:
    other = tmp_path / "other"
    shutil.copytree(deep.model, other)
    tensors = load_file(other / "model.safetensors")
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = head.bfloat16() if what == "dtype" else head * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    commands = [deep.arguments(tmp_path / "out", model=model) for model in (deep.model, other)]
    assert end(start(commands, tmp_path, port), timeout_s=200) == [2, 2], _said(tmp_path)
    assert _said(tmp_path).count("weights of the model (names, shapes, sizes, some values): rank 1 got") == 2


def test_a_process_that_fails_tells_its_own_error_and_the_others_name_it(
    deep: Inputs, tmp_path: Path, port: int
) -> None:
    missing = tmp_path / "missing.jsonl"
    commands = [deep.arguments(tmp_path / "out", data=data) for data in (deep.data, missing)]
    assert end(start(commands, tmp_path, port), timeout_s=200) == [1, 2]
    first, second = ((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))
    assert second.startswith("error: ") and "missing.jsonl" in second
    assert "rank 0: waited for what it was started with from rank 1: rank 1 has ended" in first


def test_a_signal_to_one_process_stops_all_after_the_same_step(deep: Inputs, tmp_path: Path, port: int) -> None:
    output = tmp_path / "out"
    arguments = deep.arguments(output, "--steps", "100000", "--save-every", "0")
    processes = start([arguments] * 2, tmp_path, port)
    try:
        deadline_s = time.monotonic() + 200
        while "step 1/" not in _said(tmp_path):
            assert time.monotonic() < deadline_s and processes[1].poll() is None, _said(tmp_path)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        codes = end(processes, timeout_s=60)
    assert codes == [128 + signal.SIGTERM] * 2, _said(tmp_path)
    (checkpoint,) = (output / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert _said(tmp_path).count(f"stopped by SIGTERM after step {step}; its state is saved") == 2
    read_state(checkpoint)
