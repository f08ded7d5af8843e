"""What is measured is complete and consistent; how fast anything is, is not asserted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.conftest import checkpoint, on_devices  # noqa: F401
from tests.inference.test_block_parallel import saved  # noqa: F401

from isthmus.inference.kernels import load_kernels
from isthmus.inference.layer import Layer
from isthmus.inference.native_blocks import NativeBlocks
from isthmus.inference.profile import measure_cluster
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import choose
from isthmus.planning.plans import Question
from isthmus.profiling.network import share_texts
from isthmus.profiling.steady import steady_s
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import CODECS, InferenceRequest
from isthmus.transport.base import Group


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    return tmp_path


def assert_complete(profile: ClusterProfile, num_devices: int) -> None:
    assert len(profile.devices) == len(profile.links) == num_devices
    for device in profile.devices:
        assert set(device.codecs) == set(CODECS) and device.free_memory_bytes > 0
        for widths in device.layers.values():
            assert [width.share for width in widths] == sorted((width.share for width in widths), reverse=True)
            for width in widths:
                for curve in (width.attention, width.mlp):
                    assert all(early <= late for early, late in pairwise(curve.seconds)) and curve.seconds[0] > 0
    for link in profile.links:
        assert all(early < late for early, late in pairwise(link.transfer.num_bytes))
        assert all(early <= late for early, late in pairwise(link.transfer.seconds))
        assert link.bytes_per_s > 0
        assert (link.latency_s > 0) == (num_devices > 1)


def test_devices_of_a_group_agree_on_a_profile_that_can_be_planned_with(
    checkpoint: Callable[[str], Path],  # noqa: F811
) -> None:
    directory = checkpoint("llama")
    first, second = on_devices(
        2, lambda group: measure_cluster(ShardReader(directory), group, num_rows=8), timeout_s=120
    )
    assert_complete(first, 2)
    assert (first.devices, first.links) == (second.devices, second.links)
    choice = choose(Question(spec=ShardReader(directory).spec, request=InferenceRequest(num_tokens=8), profile=first))
    assert {candidate.plan.strategy for candidate in choice.candidates} == {"single", "tensor", "sequence", "pipeline"}


def test_a_device_is_measured_once_and_again_when_asked(
    own_cache: Path,
    checkpoint: Callable[[str], Path],  # noqa: F811
) -> None:
    reader = ShardReader(checkpoint("bert"))
    told: list[str] = []
    profiles = [
        measure_cluster(reader, None, dtypes=("fp32", "int8"), num_rows=2, refresh=refresh, progress=told.append)
        for refresh in (False, False, True)
    ]
    assert told == ["measuring the devices"] * 2
    assert_complete(profiles[0], 1)
    assert profiles[0].devices[0].layers == profiles[1].devices[0].layers != profiles[2].devices[0].layers
    assert len(list(own_cache.rglob("*.json"))) == 1


def test_texts_of_any_length_come_to_all_in_the_order_of_ranks() -> None:
    texts = ["", "narrow · links", "x" * 100_000]
    assert on_devices(3, lambda group: share_texts(group, texts[group.rank])) == [texts] * 3


def test_steady_seconds_are_the_median_windows_and_the_first_run_is_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock is the test's: the first run takes 100 s, the fourth, in the first window, 50, every other 2."""
    now, calls = [0.0], [0]

    def task() -> None:
        calls[0] += 1
        now[0] += {1: 100.0, 4: 50.0}.get(calls[0], 2.0)

    monkeypatch.setattr("isthmus.profiling.steady.time.perf_counter", lambda: now[0])
    assert steady_s(task, window_s=7.0) == 2.0
    assert calls[0] == 1 + 3 + 4 + 4
    assert steady_s(task, window_s=0.0) == 2.0 and calls[0] == 12 + 1 + 3


def test_what_overlapping_costs_is_measured_for_decoupled_models(
    saved: Callable[[str, str], Path],  # noqa: F811
) -> None:
    directory = saved("bert", "four")

    def work(group: Group) -> ClusterProfile:
        return measure_cluster(ShardReader(directory), group, num_rows=32)

    first, second = on_devices(2, work, timeout_s=120)
    assert first.links == second.links
    for link in first.links:
        assert link.overlapping is not None
        assert 0 <= link.overlapping.starting_s < 0.1 and 0 <= link.overlapping.s_per_byte < 1e-5


def test_a_token_in_a_sub_block_is_measured_as_it_is_computed(
    saved: Callable[[str, str], Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if load_kernels() is None:
        pytest.skip("decode.c cannot be compiled here")
    widths: set[int] = set()

    class Noting(NativeBlocks):
        def __init__(self, layers: list[Layer], *arguments: Any, **options: Any) -> None:
            widths.update(layer.width for layer in layers)
            super().__init__(layers, *arguments, **options)

    monkeypatch.setattr("isthmus.inference.profile.NativeBlocks", Noting)
    reader = ShardReader(saved("llama", "four"))
    measure_cluster(reader, None, num_rows=1)
    assert reader.spec.decoupling is not None
    assert widths == {reader.spec.hidden_size, reader.spec.decoupling.widths[0]}


def test_a_group_can_be_used_after_it_was_measured(checkpoint: Callable[[str], Path]) -> None:  # noqa: F811
    directory = checkpoint("bert")

    def work(group: Group) -> float:
        measure_cluster(ShardReader(directory), group, num_rows=2)
        total = torch.ones(1)
        group.all_reduce(total)
        return float(total)

    assert on_devices(3, work, timeout_s=120) == [3.0] * 3
