"""What is predicted of a step on a cluster adds up, and what would help is asked in the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isthmus.models.tiny import tiny_config
from isthmus.planning.memory import Blueprint, host_bytes
from isthmus.simulation.tuning.clusters import a800
from isthmus.simulation.tuning.popularity import find_popularity
from isthmus.spec.plan_tune import DeviceNeed
from isthmus.spec.tune_cluster import TuneCluster
from isthmus.tuning.preflight.blueprint import blueprint_of, packed_inputs
from isthmus.tuning.preflight.changes import (
    CHOSEN_IN_FLIGHT,
    _faster_links,
    _for_room,
    _for_speed,
    find_changes,
    limiting,
)
from isthmus.tuning.preflight.predict import Prediction, Question, predict


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    config = tiny_config("mixtral", num_hidden_layers=8)
    return blueprint_of(config, "fp32", packed_inputs(config, 1, 16))


def question(blueprint: Blueprint, cluster: TuneCluster | None = None, **changes: Any) -> Question:
    asked = Question(
        blueprint=blueprint,
        cluster=cluster or a800(2),
        micro_batch_size=1,
        micro_batches=4,
        seq_len=16,
        num_stages=None,
        policy="mobius",
        popularity=find_popularity("uniform", blueprint.spec),
        num_steps=1,
    )
    return replace(asked, **changes)


def test_devices_and_hosts_together_have_the_whole_model(blueprint: Blueprint) -> None:
    found = predict(question(blueprint))
    assert sum(need.num_experts for need in found.devices) == 8 * 4
    whole = host_bytes(blueprint.whole.layouts.values())
    for kind, num_bytes in whole.items():
        assert sum(need.kinds_bytes[kind] for need in found.hosts) == num_bytes
    # The first device has embeddings and head.
    dense = [need.dense_bytes for need in found.devices]
    assert dense[0] > max(dense[1:])


def test_what_leaves_one_host_arrives_at_another(blueprint: Blueprint) -> None:
    found = predict(question(blueprint))
    networks = [link for link in found.links if link.name.startswith("network")]
    assert sum(link.there_bytes for link in networks) == sum(link.back_bytes for link in networks) > 0
    # Each way between hosts: a hidden state for every token, and a gradient back.
    step_bytes = 4 * 16 * 32 * 4
    assert all(link.there_bytes % step_bytes == 0 for link in networks)
    own = {link.name: link for link in found.links}
    assert own["root 0"].there_bytes == own["accelerator 0"].there_bytes + own["accelerator 1"].there_bytes
    alone = predict(question(blueprint, a800(1, 1)))
    assert [link.name for link in alone.links] == ["accelerator 0"]


def test_uneven_hosts_get_layers_by_their_speed_and_memory_and_baselines_equal_ones(blueprint: Blueprint) -> None:
    (host,) = a800(1, 1).hosts
    card = replace(host.accelerator, flops_per_s={dtype: r / 4 for dtype, r in host.accelerator.flops_per_s.items()})
    slow = replace(host, name="slow", accelerator=card, core_flops_per_s={"fp32": 1e8, "bf16": 1e8})
    cluster = replace(a800(1, 1), hosts=(host, slow), experts={})
    asked = question(blueprint, cluster, micro_batch_size=64, num_stages=4)
    equal, mapped = predict(asked), predict(replace(asked, policy="affinity"))
    assert [need.num_layers for need in equal.devices] == [4, 4]
    assert equal.step is not None and mapped.step is not None
    assert mapped.step.num_stages == 4 and mapped.step.step_s <= equal.step.step_s
    fast, weak = (need.num_layers for need in mapped.devices)
    assert fast + weak == 8 and weak < 4


def test_every_change_that_could_help_is_tried(blueprint: Blueprint) -> None:
    asked = question(blueprint, num_stages=4)
    found = predict(asked)
    tried = {text: changed for text, _, changed in _for_speed(asked, found, lambda dtype: blueprint)}
    assert {
        "--micro-batches 8 instead of 4",
        "--policy affinity",
        "--num-stages 8",
        "twice as many hosts",
    } <= tried.keys()
    assert "--num-stages 2" not in tried and "--dtype bf16 instead of fp32" not in tried
    twice = tried["twice as many hosts"].cluster
    assert twice.num_accelerators == 8
    more = tried["accelerators with twice the memory"].cluster.hosts[0].accelerator
    assert more.memory_bytes == 2 * asked.cluster.hosts[0].accelerator.memory_bytes
    unnamed = question(blueprint, policy="affinity")
    names = {text for text, _, _ in _for_speed(unnamed, found, lambda dtype: blueprint)}
    assert not [text for text in names if "--num-stages" in text or "--policy" in text]


def test_faster_links_load_what_was_measured_faster_too() -> None:
    before, after = a800(2), _faster_links(a800(2))
    for shape, measured in before.experts.items():
        assert measured.load_s is not None
        assert after.experts[shape].load_s == measured.load_s / 2
    assert after.hosts[0].root_bytes_per_s == 2 * before.hosts[0].root_bytes_per_s


def test_changes_are_the_best_first_and_name_what_limits(blueprint: Blueprint) -> None:
    asked = question(blueprint)
    found = predict(asked)
    changes = find_changes(asked, found, lambda dtype: blueprint)
    gains = [change.gain or 0 for change in changes]
    assert 1 <= len(changes) <= 3 and gains == sorted(gains, reverse=True) and gains[-1] >= 1.02
    resources = [change.resource for change in changes if change.resource]
    assert found.step is not None
    assert limiting(found, changes) == (resources[0] if resources else max(found.step.busy_shares))
    assert limiting(found, ()) in found.step.busy_shares


def test_what_is_short_of_memory_is_offered_what_has_enough(blueprint: Blueprint) -> None:
    asked = question(blueprint, policy="affinity")
    need = max(predict(asked).devices, key=lambda need: need.minimum_bytes)
    hosts = [
        replace(host, accelerator=replace(host.accelerator, memory_bytes=need.minimum_bytes - 1))
        for host in asked.cluster.hosts
    ]
    tight = replace(asked, cluster=replace(asked.cluster, hosts=tuple(hosts)))
    found = predict(tight)
    short = [one for one in found.devices if one.short_bytes]
    assert not found.fits and found.step is None and {one.short_bytes for one in short} == {1}
    tried = {text: changed for text, _, changed in _for_room(tight, found)}
    assert list(tried) == ["accelerators with 1.00 GiB", "2 times as many hosts"]
    assert all(predict(changed).fits for changed in tried.values())
    asked_for_all = replace(tight, micro_batches_in_flight=4)
    tried = {text: changed for text, _, changed in _for_room(asked_for_all, predict(asked_for_all))}
    assert CHOSEN_IN_FLIGHT in tried and tried[CHOSEN_IN_FLIGHT] == tight


def with_memory(asked: Question, memory_bytes: int) -> Question:
    hosts = [
        replace(host, accelerator=replace(host.accelerator, memory_bytes=memory_bytes)) for host in asked.cluster.hosts
    ]
    return replace(asked, cluster=replace(asked.cluster, hosts=tuple(hosts)))


def test_micro_batches_go_in_flights_where_not_all_fit(blueprint: Blueprint) -> None:
    asked = question(blueprint, micro_batches=6)
    all_at_once = replace(asked, micro_batches_in_flight=6)
    needed = [max(one.minimum_bytes for one in predict(one_by_one).devices) for one_by_one in (asked, all_at_once)]
    assert needed[0] < needed[1]
    roomy, tight = with_memory(asked, needed[1]), with_memory(asked, needed[1] - 1)
    assert predict(roomy).num_in_flight == 6 and predict(tight).num_in_flight == 3
    assert predict(with_memory(asked, needed[0])).num_in_flight == 1
    assert not predict(with_memory(all_at_once, needed[1] - 1)).fits
    assert not predict(with_memory(asked, needed[0] - 1)).fits


@pytest.mark.parametrize("policy", ["mobius", "affinity"])
def test_flights_load_more_and_take_longer_but_compute_the_same(blueprint: Blueprint, policy: str) -> None:
    asked = question(blueprint, micro_batches=6, policy=policy, num_stages=4)
    steps, loaded = [], []
    for num_in_flight in (6, 4, 2, 1):
        found = predict(replace(asked, micro_batches_in_flight=num_in_flight))
        assert found.step is not None
        # Of 4 in flight at most, two times three go together.
        assert found.num_in_flight == {4: 3}.get(num_in_flight, num_in_flight)
        steps.append(found.step.step_s)
        loaded.append(sum(link.there_bytes for link in found.links if link.name.startswith("accelerator")))
        networks = [link.there_bytes for link in found.links if link.name.startswith("network")]
        assert sum(networks) % (6 * 16 * 32 * 4) == 0
    assert steps == sorted(steps) and steps[-1] > steps[0]
    assert loaded == sorted(loaded)
    if policy == "mobius":
        # Each of k flights loads what one does.
        assert loaded == pytest.approx([number * loaded[0] for number in (1, 2, 3, 6)], rel=1e-6)


def test_what_was_asked_to_be_in_flight_may_be_what_is_slow(blueprint: Blueprint) -> None:
    asked = question(blueprint, micro_batches_in_flight=1)
    texts = [text for text, _, _ in _for_speed(asked, predict(asked), lambda dtype: blueprint)]
    assert CHOSEN_IN_FLIGHT in texts
    free = question(blueprint)
    assert CHOSEN_IN_FLIGHT not in [text for text, _, _ in _for_speed(free, predict(free), lambda dtype: blueprint)]
    with pytest.raises(ValueError, match="micro_batches_in_flight: got 5, wanted a whole number from 1 to 4"):
        predict(question(blueprint, micro_batches_in_flight=5))


def test_a_plan_that_fits_but_cannot_be_simulated_says_why(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Experts that come one by one fit where two whole stages do not.
    config = tiny_config("mixtral", num_hidden_layers=2, num_local_experts=64, intermediate_size=512)
    wide = blueprint_of(config, "fp32", packed_inputs(config, 1, 16))
    asked = question(wide, a800(1, 1), policy="affinity")
    least = predict(asked).devices[0].minimum_bytes
    host = asked.cluster.hosts[0]
    small = replace(host, accelerator=replace(host.accelerator, memory_bytes=2 * least))
    found = predict(replace(asked, cluster=replace(asked.cluster, hosts=(small,))))
    assert found.fits and found.step is None and "do not fit an accelerator" in found.reason


def test_needs_say_how_much_is_missing() -> None:
    need = DeviceNeed(
        device=0,
        host=0,
        num_layers=1,
        num_stages=1,
        memory_bytes=10,
        dense_bytes=1,
        is_dense_resident=False,
        activation_bytes=1,
        slot_bytes=1,
        num_slots=0,
        num_experts=1,
        total_bytes=14,
        minimum_bytes=14,
    )
    assert need.short_bytes == 4 and replace(need, memory_bytes=20).short_bytes == 0
    whole = Prediction(devices=(need,), hosts=(), links=(), num_in_flight=1, step=None, skewness=None, reason="")
    assert not whole.fits
