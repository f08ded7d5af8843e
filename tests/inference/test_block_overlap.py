"""Exchanges in two portions of the tokens, while others are computed: all is as without, and as the planner says."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.inference.conftest import on_devices
from tests.inference.test_block_parallel import (
    FORMS,
    MIXED,
    Saved,
    batch,
    check_sent_and_held,
    continued,
    error,
    expected,
    hidden_states,
    reference,
    saved,  # noqa: F401
    states_of_all,
)
from tests.inference.test_recovery import ATTENDED, IDS, Devices

from isthmus.inference.engine import Engine
from isthmus.models.shards import ShardReader
from isthmus.planning import block_layout
from isthmus.planning.plans import expected_error
from isthmus.planning.workload import workload
from isthmus.spec.inference import CODECS, ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.transport.base import Group
from isthmus.transport.errors import PeerLostError
from isthmus.transport.sockets import SocketGroup


@pytest.fixture(autouse=True)
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens a request has."""
    monkeypatch.setattr(block_layout, "LEAST_DIVIDED_TOKENS", 1)


def overlapping(weights: tuple[float, ...], originals: tuple[str, ...], **options: Any) -> InferencePlan:
    devices = tuple(range(len(weights)))
    return InferencePlan(
        strategy="block", devices=devices, weights=weights, originals=originals, overlaps=True, **options
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.2, 0.45, 0.6), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("kind", ORIGINAL_PLANS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
@pytest.mark.parametrize("form", ["four", "middle"])
def test_every_way_is_what_transformers_computes(
    form: str,
    family: str,
    kind: str,
    weights: tuple[float, ...],
    saved: Saved,  # noqa: F811
) -> None:
    plan = overlapping(weights, (kind,) * len(FORMS[form]["original_layers"]))
    assert error(hidden_states(saved(family, form), family, plan), expected(family, form)) <= 1e-5


@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
@pytest.mark.parametrize("form", ["first-original", "two-in-a-row"])
def test_neighbouring_layers_may_differ_in_their_way(
    form: str,
    first: str,
    second: str,
    saved: Saved,  # noqa: F811
) -> None:
    plan = overlapping((1.0, 2.0, 1.0), (first, second))
    assert error(hidden_states(saved("bert", form), "bert", plan), expected("bert", form)) <= 1e-5


@pytest.mark.parametrize("codecs", [*MIXED, ("int8", "int8"), ("int4", "int4")], ids="-".join)
@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
def test_codecs_round_as_much_as_without(
    first: str,
    second: str,
    codecs: tuple[str, str],
    saved: Saved,  # noqa: F811
) -> None:
    """And all devices end with the same bits."""
    plan = overlapping((1.0, 2.0, 1.0), (first, second), codecs=codecs)
    spec = ShardReader(saved("bert", "middle")).spec
    found, mask_BT = states_of_all(saved("bert", "middle"), plan), batch("bert")[1].bool()
    assert all(torch.equal(each, found[0]) for each in found)
    got, request = error(found[0][mask_BT], expected("bert", "middle")), InferenceRequest(num_tokens=13, batch=2)
    rounded = expected_error(plan, spec, request)
    assert rounded == expected_error(replace(plan, overlaps=False), spec, request)
    assert got <= 1e-5 if not rounded else 1e-5 < got <= 3 * rounded


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ORIGINAL_PLANS)
@pytest.mark.parametrize("form", ["four", "end-decoupled", "middle", "two-in-a-row"])
def test_the_planner_knows_what_is_sent(form: str, kind: str, codec: str, saved: Saved) -> None:  # noqa: F811
    kinds = (kind,) * len(FORMS[form]["original_layers"])
    check_sent_and_held(saved("bert", form), overlapping((0.2, 0.45, 0.6), kinds, codec=codec))


@pytest.mark.parametrize("kind", ["gather", "tensor"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_tokens_after_a_prompt_that_overlapped_are_those_of_transformers(
    family: str,
    kind: str,
    saved: Saved,  # noqa: F811
) -> None:
    ids_BT, mask_BT = batch("llama")
    model = reference(family, "middle")
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = None, 0
    wanted = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=5, do_sample=False)[:, ids_BT.shape[1] :]
    assert torch.equal(continued(saved(family, "middle"), overlapping((1.0, 1.0), (kind, kind)), 5), wanted)


def num_exchanges(plan: InferencePlan, spec: Any, request: InferenceRequest) -> int:
    return workload(plan, spec, request).num_exchanges()


def test_short_requests_and_teams_exchange_all_at_once(
    saved: Saved,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ShardReader(saved("bert", "four")).spec
    plan = overlapping((1.0, 1.0), ("tokens",))
    plain = replace(plan, overlaps=False)
    monkeypatch.setattr(block_layout, "LEAST_DIVIDED_TOKENS", 32)
    for request, more in (
        (InferenceRequest(num_tokens=31), 0),
        (InferenceRequest(num_tokens=16, batch=2), 1),
        (InferenceRequest(num_tokens=32), 1),
    ):
        assert num_exchanges(plan, spec, request) == num_exchanges(plain, spec, request) + more
    team = overlapping((1.0,) * 3, ("tokens",))
    spec = ShardReader(saved("bert", "two")).spec
    request = InferenceRequest(num_tokens=64)
    assert num_exchanges(team, spec, request) == num_exchanges(replace(team, overlaps=False), spec, request)
    check_sent_and_held(saved("bert", "two"), team)


def test_the_first_portion_is_on_its_way_while_the_second_is_computed(
    saved: Saved,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has begun, on the group's own thread, before the other's MLP, and none waits for it first."""
    plan = overlapping((1.0, 1.0), ("gather",))
    seen: list[tuple[str, int]] = []
    lock = threading.Lock()

    def noted(what: str, call: Any) -> Any:
        def note(*arguments: Any, **options: Any) -> Any:
            with lock:
                seen.append((what, threading.get_ident()))
            return call(*arguments, **options)

        return note

    ids_BT, mask_BT = batch("bert")

    def work(group: Group) -> list[str]:
        with Engine(saved("bert", "four"), group=group, plan=plan) as engine:
            if not engine.is_leader:
                engine.follow()
                return []
            [model] = engine.local_models
            for block in model.blocks[1]:
                block.mlp = noted("mlp", block.mlp)  # type: ignore[method-assign]
            model.originals[2].qkv = noted("product", model.originals[2].qkv)  # type: ignore[assignment]
            group.all_gather = noted("gather", group.all_gather)  # type: ignore[method-assign]
            start = group.start

            def start_noted(call: Any, *arguments: Any, **options: Any) -> Any:
                seen.append(("start", threading.get_ident()))
                handle = start(call, *arguments, **options)
                handle.wait = noted("wait", handle.wait)  # type: ignore[method-assign]
                return handle

            group.start = start_noted  # type: ignore[method-assign]
            engine.hidden(ids_BT, mask_BT.bool())
        own = threading.get_ident()
        assert all(thread != own for what, thread in seen if what == "gather")
        return [what for what, thread in seen if thread == own and what != "gather"]

    assert on_devices(2, work)[0] == [
        *("mlp", "mlp", "start", "mlp", "mlp", "start"),  # two sub-blocks a device
        *("wait", "product", "wait", "product"),
    ]


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("kind", ["gather", "sequence"])
def test_one_that_is_killed_amid_such_an_exchange_is_done_without(
    kind: str,
    at: int,
    saved: Saved,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before its first portion has gone, and before its second."""
    devices = Devices(saved("bert", "four"), overlapping((1.0,) * 4, (kind,)))
    wanted = Engine(saved("bert", "four")).hidden(IDS, ATTENDED)
    num_started: dict[int, int] = {}
    start = SocketGroup.start
    is_armed = threading.Event()

    def start_or_die(group: SocketGroup, *arguments: Any, **options: Any) -> Any:
        rank = group.global_ranks[group.rank]
        if is_armed.is_set():
            num_started[rank] = num_started.get(rank, 0) + 1
            if rank == 2 and num_started[rank] == at:
                devices.kill(2)
        return start(group, *arguments, **options)

    monkeypatch.setattr(SocketGroup, "start", start_or_die)

    def lead(engine: Engine) -> int:
        torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-4, atol=1e-5)
        is_armed.set()
        torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-4, atol=1e-5)
        return len(engine.plan.devices)

    assert devices.run(4, lead)[0] == 3
    assert num_started[2] >= at and devices.told == ["rank 2 lost; 3 devices are left"]


def test_who_is_lost_amid_such_an_exchange_is_named(
    saved: Saved,  # noqa: F811
) -> None:
    """With the error of a call that blocks."""
    plan = overlapping((1.0, 1.0, 1.0), ("gather",))
    ids_BT, mask_BT = batch("bert")

    def work(group: Group) -> str:
        with Engine(saved("bert", "four"), group=group, plan=plan) as engine:
            if group.rank == 2:
                [model] = engine.local_models
                model.blocks[1][0].mlp = lambda x: group.close() or x  # type: ignore[method-assign]
            with pytest.raises(Exception) as met:
                if engine.is_leader:
                    engine.hidden(ids_BT, mask_BT.bool())
                else:
                    engine.follow_once()
            return f"{isinstance(met.value, PeerLostError)} {met.value}"

    found = on_devices(3, work)
    assert all(text.startswith("True rank 2 is lost") for text in found[:2]), found
