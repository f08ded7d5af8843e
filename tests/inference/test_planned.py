"""Planning by all devices together: measured once, measured again when a link has changed, one plan for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.conftest import on_devices

from isthmus.inference import planned, profile, session
from isthmus.inference.engine import Engine
from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.planned import Planner, Wish, join
from isthmus.inference.runtime_planner import RuntimePlanner
from isthmus.models.shards import ShardReader
from isthmus.planning.pieces import resident_bytes
from isthmus.planning.residency import Residency
from isthmus.profiling import cache
from isthmus.spec.cluster import LinkProfile, Transfer
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.transport.base import Group

Checkpoint = Callable[[str], Path]
WISH = Wish(request=InferenceRequest(num_tokens=9))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))


@pytest.fixture
def model(checkpoint: Checkpoint) -> Path:
    return checkpoint("bert")


def agree(model: Path, wish: Wish = WISH, num_devices: int = 2) -> tuple[list[InferencePlan], list[str]]:
    """Each device's plan, and what the leader tells."""
    lines: list[str] = []

    def work(group: Group) -> InferencePlan:
        tell: Callable[[str], None] = lines.append if group.rank == 0 else lambda text: None
        return Planner(wish, ShardReader(model), tell).arrange(group).plans[0]

    return on_devices(num_devices, work), lines


def test_all_devices_get_the_same_plan_and_measure_once(model: Path) -> None:
    plans, lines = agree(model)
    assert plans[0] == plans[1] and plans[0].devices[0] == 0
    assert lines[:2] == ["measuring the devices", "measuring the links"] and len(lines) == 3
    _, again = agree(model, replace(WISH, request=InferenceRequest(num_tokens=20, batch=3)))
    assert "measuring the devices" not in again
    _, refreshed = agree(model, replace(WISH, refresh=True))
    assert refreshed[:2] == lines[:2]


def test_links_are_measured_again_when_they_have_changed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(model)
    monkeypatch.setattr(profile, "is_as_measured", lambda group, link: True)
    assert len(agree(model)[1]) == 1

    def find_slower(kind: type, identity: Any) -> Any:
        found = cache.find(kind, identity)
        if not isinstance(found, LinkProfile):
            return found
        seconds = tuple(100 * second + 1 for second in found.transfer.seconds)
        return replace(found, transfer=Transfer(num_bytes=found.transfer.num_bytes, seconds=seconds))

    monkeypatch.undo()
    monkeypatch.setenv("ISTHMUS_CACHE", str(cache.cache_directory()))
    monkeypatch.setattr(profile, "find", find_slower)
    assert "measuring the links" in agree(model)[1]


def test_a_plan_that_is_given_is_taken_without_measuring(model: Path) -> None:
    plan = InferencePlan.even("tensor", 2, codec="bf16")
    assert agree(model, replace(WISH, plan=plan)) == ([plan, plan], [])


def test_generating_never_divides_tokens(model: Path) -> None:
    wish = replace(WISH, request=InferenceRequest(num_tokens=9, num_new_tokens=5))
    assert agree(model, wish)[0][0].strategy in ("single", "tensor")


def test_where_nothing_fits_every_device_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "free_memory_bytes", lambda: 1000)
    with pytest.raises(IsthmusError, match="memory: no plan fits"):
        agree(model)


@pytest.mark.parametrize("is_short", [False, True])
def test_where_the_leader_plans_so_all_devices_are_frugal(
    model: Path, monkeypatch: pytest.MonkeyPatch, is_short: bool
) -> None:
    """Each keeps parts that do not overlap, gives freed memory back for a request that would not fit else, and the
    answer is the same."""
    plans = (InferencePlan.even("sequence", 2), InferencePlan.even("tensor", 2))
    residency = Residency(plans=plans, loss=1.0, reason="it was told so", is_frugal=True)
    minded: list[str] = []
    monkeypatch.setattr(planned, "plans_to_keep", lambda question: residency)
    monkeypatch.setattr(RuntimePlanner, "gives_back", lambda self, request, number: is_short)
    monkeypatch.setattr(session, "return_freed_memory", lambda: minded.append("returns"))
    monkeypatch.setattr(session, "reuse_freed_memory", lambda: minded.append("reuses"))
    ids_BT = torch.arange(3, 12)[None]
    attended_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    wanted = Engine(model).mean(ids_BT, attended_BT)

    def work(group: Group) -> int:
        with join(ShardReader(model), WISH, group) as engine:
            held = {id(part): part.num_bytes for local in engine.local_models for part in parts_under(local)}
            if engine.is_leader:
                torch.testing.assert_close(engine.mean(ids_BT, attended_BT), wanted, rtol=0, atol=1e-5)
            else:
                engine.follow()
            return sum(held.values())

    spec = ShardReader(model).spec
    assert on_devices(2, work) == resident_bytes(plans[:1], spec, 2)
    assert minded == ["returns" if is_short else "reuses"] * 2


def parts_under(local: LocalModel) -> Iterator[Layer]:
    for layer in local.layers:
        yield from layer._parts or (layer,)


def test_one_device_needs_no_plan(model: Path) -> None:
    assert Planner(WISH, ShardReader(model)).arrange(None).plans[0] == InferencePlan.even("single", 1)
