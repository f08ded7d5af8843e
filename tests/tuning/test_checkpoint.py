"""Training state on disk: a run resumes exactly, and no crash, full disk or damaged file loses the last good state."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.training import checkpoints
from isthmus.training.checkpoints import CheckpointError, checkpoint_directory, find_resumable, prune_checkpoints
from isthmus.tuning.checkpoint import load_training_state, save_training_state
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore


def make_run(dtype: str = "bf16", size: int = 100, seed: int = 0) -> tuple[ParameterStore, StoreOptimizer]:
    layouts = {
        UnitKey(0, expert): UnitLayout(tensors=(TensorSpec(name="w", shape=(size,)),), dtype=dtype)
        for expert in range(3)
    } | {UnitKey(-1, -2): UnitLayout(tensors=(TensorSpec(name="norm", shape=(8, 2)),), dtype="fp32")}
    store = ParameterStore(layouts, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    for key in store.keys:
        store.master(key).copy_(torch.randn(store.numel(key), generator=generator))
        store.publish(key)
    return store, StoreOptimizer(store, learning_rate=1e-2, clip_norm=1.0)


def take_steps(store: ParameterStore, optimizer: StoreOptimizer, num_steps: int) -> None:
    """Gradients come from torch's global generator, so that a resumed run needs its state too."""
    for _ in range(num_steps):
        for key in store.keys:
            optimizer.add_gradient(key, torch.randn(store.numel(key)))
        optimizer.begin_step(optimizer.num_steps + 1)
        optimizer.step_units(store.keys)
        optimizer.end_step()


def everything(store: ParameterStore) -> list[Tensor]:
    kinds = (store.weight, store.master, store.exp_avg, store.exp_avg_sq)
    return [flat(key).clone() for key in store.keys for flat in kinds]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, dtype: str) -> None:
    store, optimizer = make_run(dtype)
    take_steps(store, optimizer, 3)
    # Shards of one tensor each, so that resuming reads many.
    save_training_state(tmp_path / "a", store, optimizer, {"epoch": 2}, {"p": torch.arange(5)}, shard_bytes=1)
    take_steps(store, optimizer, 3)
    draws = (random.random(), numpy.random.rand(), torch.rand(()).item())

    resumed_store, resumed_optimizer = make_run(dtype, seed=1)
    trainer_state, extra = load_training_state(tmp_path / "a", resumed_store, resumed_optimizer)
    assert trainer_state == {"epoch": 2}
    assert list(extra) == ["p"] and torch.equal(extra["p"], torch.arange(5))
    assert resumed_optimizer.num_steps == 3
    take_steps(resumed_store, resumed_optimizer, 3)
    assert equal(everything(resumed_store), everything(store))
    assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == draws


def test_file_format_is_the_golden_one(tmp_path: Path) -> None:
    store, optimizer = make_run()
    take_steps(store, optimizer, 1)
    save_training_state(tmp_path / "a", store, optimizer, {"seed": 7}, {"predictor.0": torch.ones(2)}, shard_bytes=4000)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "extra.safetensors",
        "state.json",
        "units-00001.safetensors",
    ]
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    assert list(state) == ["schema_version", "kind", "layout", "optimizer", "rng", "trainer", "file_bytes"]
    assert (state["schema_version"], state["kind"]) == (1, "training-state")
    assert (state["optimizer"], state["trainer"]) == ({"num_steps": 1}, {"seed": 7})
    assert state["layout"] == {
        "fingerprint": "c37fd4ea0880246549135c811b67b3218de13c763fb29afaf4673f1075688688",
        "num_units": 4,
        "num_parameters": {"fp32": 16, "bf16": 300},
    }
    with safe_open(tmp_path / "a" / "units-00001.safetensors", "pt") as shard:
        assert sorted(shard.keys()) == sorted(
            f"layer.{unit}.{kind}"
            for unit in ("-1.expert.-2", "0.expert.0", "0.expert.1", "0.expert.2")
            for kind in ("master", "exp_avg", "exp_avg_sq")
        )
        assert torch.equal(shard.get_tensor("layer.0.expert.1.master"), store.master(UnitKey(0, 1)))
        assert torch.equal(shard.get_tensor("layer.0.expert.1.exp_avg"), store.exp_avg(UnitKey(0, 1)))
    with safe_open(tmp_path / "a" / "extra.safetensors", "pt") as shard:
        assert {name for name in shard.keys() if "cuda" not in name} == {"extra.predictor.0", "rng.torch"}  # noqa: SIM118


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    store, optimizer = make_run()
    saved: list[tuple[int, int]] = []
    save_training_state(tmp_path / "a", store, optimizer, {}, on_progress=lambda *bytes_: saved.append(bytes_))
    loaded: list[tuple[int, int]] = []
    load_training_state(tmp_path / "a", store, optimizer, on_progress=lambda *bytes_: loaded.append(bytes_))
    for seen in (saved, loaded):
        done = [done_bytes for done_bytes, _ in seen]
        assert done == sorted(set(done)) and {total_bytes for _, total_bytes in seen} == {done[-1]}


@pytest.mark.parametrize("other", [{"dtype": "fp32"}, {"size": 101}])
def test_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path: Path, other: dict) -> None:
    save_training_state(tmp_path / "a", *make_run(), {})
    store, optimizer = make_run(**other)
    before = everything(store)
    with pytest.raises(CheckpointError, match=r"another model or dtype: 4 units, 16 fp32 \+ 300 bf16 parameters; this"):
        load_training_state(tmp_path / "a", store, optimizer)
    assert equal(everything(store), before)


@pytest.mark.parametrize("victim", ["units-00001.safetensors", "extra.safetensors", "state.json"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_truncated_file_falls_back_to_the_previous_checkpoint(tmp_path: Path, victim: str, is_gone: bool) -> None:
    store, optimizer = make_run()
    for step in (1, 2):
        save_training_state(checkpoint_directory(tmp_path, step), store, optimizer, {"step": step})
    broken = checkpoint_directory(tmp_path, 2)
    content = (broken / victim).read_bytes()
    (broken / victim).unlink()
    if not is_gone:
        (broken / victim).write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=f"{victim}.*resume from another checkpoint"):
        load_training_state(broken, store, optimizer)
    messages: list[str] = []
    found = find_resumable(tmp_path, notify=messages.append)
    assert found == checkpoint_directory(tmp_path, 1)
    assert len(messages) == 1 and "step-00000002" in messages[0]
    assert found is not None and load_training_state(found, store, optimizer)[0] == {"step": 1}


def test_damaged_header_is_refused(tmp_path: Path) -> None:
    store, optimizer = make_run()
    save_training_state(tmp_path / "a", store, optimizer, {})
    shard = tmp_path / "a" / "units-00001.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"units-00001.safetensors: damaged"):
        load_training_state(tmp_path / "a", store, optimizer)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    store, optimizer = make_run()
    save_training_state(tmp_path / "a", store, optimizer, {}, shard_bytes=1)
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    del state["file_bytes"]["units-00002.safetensors"]
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, layer.-1.expert.-2.exp_avg first"):
        load_training_state(tmp_path / "a", store, optimizer)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    store, optimizer = make_run()
    save_training_state(tmp_path / "a", store, optimizer, {})
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    (tmp_path / "a" / "state.json").write_text(json.dumps(state | {"schema_version": 2}))
    with pytest.raises(CheckpointError, match="schema_version is 2, this version reads 1"):
        load_training_state(tmp_path / "a", store, optimizer)


def test_full_disk_keeps_the_previous_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, optimizer = make_run()
    save_training_state(checkpoint_directory(tmp_path, 1), store, optimizer, {"step": 1}, shard_bytes=1)
    before = everything(store)
    take_steps(store, optimizer, 1)
    write, calls = checkpoints.save_file, []

    def full_after_two(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full_after_two)
    for directory in (checkpoint_directory(tmp_path, 1), checkpoint_directory(tmp_path, 2)):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            save_training_state(directory, store, optimizer, {"step": 2}, shard_bytes=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = find_resumable(tmp_path, notify=pytest.fail)
    assert found == checkpoint_directory(tmp_path, 1)
    assert found is not None and load_training_state(found, store, optimizer)[0] == {"step": 1}
    assert equal(everything(store), before)


def test_safetensors_failure_to_write_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        raise checkpoints.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*units-00001.safetensors: I/O error: No space left"):
        save_training_state(tmp_path / "a", *make_run(), {})
    assert list(tmp_path.iterdir()) == []


def test_killed_save_leaves_the_previous_checkpoint_loadable(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_checkpoint import make_run, take_steps
from isthmus.training.checkpoints import checkpoint_directory
from isthmus.tuning.checkpoint import save_training_state
store, optimizer = make_run()
output = Path({str(tmp_path)!r})
save_training_state(checkpoint_directory(output, 1), store, optimizer, {{"step": 1}})
take_steps(store, optimizer, 1)
def die(done, total):
    os.kill(os.getpid(), signal.SIGKILL)
save_training_state(checkpoint_directory(output, 2), store, optimizer, {{"step": 2}}, shard_bytes=1, on_progress=die)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (
        len(list((tmp_path / "checkpoints").iterdir())) == 2
    )  # the half-written one is still there, under another name
    found = find_resumable(tmp_path, notify=pytest.fail)
    assert found == checkpoint_directory(tmp_path, 1)
    assert list((tmp_path / "checkpoints").iterdir()) == [found]
    store, optimizer = make_run(seed=5)
    assert found is not None and load_training_state(found, store, optimizer)[0] == {"step": 1}
    assert equal(everything(store), everything(make_run()[0]))


def test_two_newest_checkpoints_stay(tmp_path: Path) -> None:
    run = make_run()
    for step in (9, 10, 100, 123456789):
        save_training_state(checkpoint_directory(tmp_path, step), *run, {})
        prune_checkpoints(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000100", "step-123456789"]
    assert find_resumable(tmp_path, notify=pytest.fail) == checkpoint_directory(tmp_path, 123456789)
    with pytest.raises(ValueError, match="keep: got 0"):
        prune_checkpoints(tmp_path, keep=0)


def test_no_checkpoint_is_not_an_error_but_only_broken_ones_are(tmp_path: Path) -> None:
    assert find_resumable(tmp_path, notify=pytest.fail) is None
    prune_checkpoints(tmp_path)
    save_training_state(checkpoint_directory(tmp_path, 1), *make_run(), {})
    (checkpoint_directory(tmp_path, 1) / "extra.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        find_resumable(tmp_path, notify=lambda message: None)


def test_nothing_is_written_in_the_middle_of_a_step_or_without_json(tmp_path: Path) -> None:
    store, optimizer = make_run()
    written: list[int] = []
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_training_state(
            tmp_path / "a", store, optimizer, {"when": object()}, on_progress=lambda done, total: written.append(done)
        )
    assert written == []
    optimizer.begin_step(1)
    with pytest.raises(RuntimeError, match="step 1 is under way"):
        save_training_state(tmp_path / "a", store, optimizer, {})
    assert list(tmp_path.iterdir()) == []
