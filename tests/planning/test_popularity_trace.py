"""The file of expert counts: what is written is read, and what is not a trace of this model is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.planning.popularity_trace import PopularityTrace, model_identity, read_trace, write_trace
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ModelSpec


def trace(spec: ModelSpec) -> PopularityTrace:
    counts = np.arange(2 * 5 * 4).reshape(2, 5, 4)
    return PopularityTrace(model=model_identity(spec), num_experts=(4,) * 5, top_k=(2,) * 5, counts=counts)


def test_what_is_written_is_read(spec: ModelSpec, tmp_path: Path) -> None:
    written = trace(spec)
    write_trace(written, tmp_path / "popularity.npz")
    found = read_trace(tmp_path / "popularity.npz")
    found.check(spec)
    assert found.model == "Tiny 5 x 8x16" and found.num_experts == (4,) * 5 and found.top_k == (2,) * 5
    assert found.counts.dtype == np.int64 and (found.counts == written.counts).all()


def test_the_file_has_these_fields_and_no_pickles(spec: ModelSpec, tmp_path: Path) -> None:
    write_trace(trace(spec), tmp_path / "popularity.npz")
    with np.load(tmp_path / "popularity.npz", allow_pickle=False) as file:
        assert sorted(file) == ["counts", "model", "num_experts", "schema_version", "top_k"]
        assert int(file["schema_version"]) == 1 and str(file["model"]) == "Tiny 5 x 8x16"


def test_a_trace_of_another_model_is_refused(spec: ModelSpec) -> None:
    other = replace(trace(spec), model="Other 5 x 8x16")
    with pytest.raises(IsthmusError, match="popularity: the trace is of another model: Other 5 x 8x16 with 5 × 4 exp"):
        other.check(spec)
    fewer = replace(trace(spec), num_experts=(4, 4, 4, 4, 3), counts=np.zeros((1, 5, 4), np.int64))
    with pytest.raises(IsthmusError, match=r"with \[4, 4, 4, 4, 3\] experts, wanted Tiny 5 x 8x16 with 5 × 4"):
        fewer.check(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.zeros((0, 5, 4), np.int64)}, r"counts: got shape \(0, 5, 4\), wanted \(steps, 5, 4\) with one"),
        ({"counts": np.zeros((1, 5, 3), np.int64)}, r"counts: got shape \(1, 5, 3\), wanted \(steps, 5, 4\)"),
        ({"counts": np.full((1, 5, 4), -1)}, "counts: some are below 0"),
        ({"top_k": (2,)}, "top_k: got 1 layers, wanted 5"),
        ({"num_experts": (4, 4, 4, 4, 3)}, "counts: a layer has tokens beyond its num_experts"),
    ],
)
def test_counts_that_cannot_be_are_refused(spec: ModelSpec, changes: dict[str, object], message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        replace(trace(spec), **changes)  # type: ignore[arg-type]


def test_a_file_that_is_no_trace_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "popularity.npz"
    with pytest.raises(IsthmusError, match=r"popularity: cannot read .*No such file.*wanted gini=… or a trace"):
        read_trace(path)
    path.write_text("no numbers")
    with pytest.raises(IsthmusError, match=r"popularity: .*popularity\.npz is no \.npz; wanted a trace"):
        read_trace(path)
    np.savez(path, counts=np.zeros(3))
    with pytest.raises(IsthmusError, match="has no schema_version, model, num_experts, top_k; wanted a trace"):
        read_trace(path)
    write_trace(trace(spec), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IsthmusError, match=r"popularity: .*popularity\.npz"):
        read_trace(path)
    path.write_bytes(whole)
    with np.load(path) as file:
        fields = {name: file[name] for name in file if name != "schema_version"}
    np.savez(path, allow_pickle=False, schema_version=np.array(2), **fields)
    with pytest.raises(IsthmusError, match="schema_version is 2, wanted 1: record it again"):
        read_trace(path)


def test_counts_that_runs_keep_become_a_trace_in_the_order_of_the_layers(spec: ModelSpec) -> None:
    steps = [{layer: [step, layer, 0, 1] for layer in reversed(spec.moe_layers)} for step in range(3)]
    found = PopularityTrace.of_steps(spec, steps)
    found.check(spec)
    assert found.top_k == tuple(layer.top_k for layer in spec.layers if layer is not None)
    assert found.counts[2, :, :].tolist() == [[2, layer, 0, 1] for layer in spec.moe_layers]
    with pytest.raises(IsthmusError, match="with one step or more"):
        PopularityTrace.of_steps(spec, [])


def test_skewness_and_drift_of_known_counts(spec: ModelSpec) -> None:
    one, other = [8, 0, 0, 0], [4, 4, 0, 0]
    found = replace(trace(spec), counts=np.array([[one] * 5, [other] * 5]))
    assert found.skewness_L == pytest.approx([0.75] * 5)
    assert found.drift == pytest.approx(0.5)
    same = replace(trace(spec), counts=np.array([[one] * 5, [one] * 5]))
    assert same.drift == same.drift_by_chance == 0
    assert replace(same, counts=same.counts[:1]).drift == 0


def test_drift_by_chance_is_what_independent_choices_drift(spec: ModelSpec) -> None:
    random = np.random.default_rng(0)
    counts = random.multinomial(400, [0.5, 0.3, 0.15, 0.05], size=(200, 5))
    found = replace(trace(spec), counts=counts)
    assert found.drift == pytest.approx(found.drift_by_chance, rel=0.03)
