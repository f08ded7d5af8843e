"""Layers to stages to devices: against brute force where that is possible, and what must hold anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.mapping import (
    DevicePlace,
    LayerNeeds,
    MappingProblem,
    StageMapping,
    _Weigher,
    choose_cuts,
    device_order,
    map_layers,
    predict_cuts,
)
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Stage

AMPLE = 10**9


def problem(
    layer_s: Sequence[float],
    speeds: Sequence[float] = (1.0, 1.0),
    *,
    held_bytes: int = 1,
    gradient_bytes: int = 0,
    memory_bytes: Sequence[int] | None = None,
    hosts: Sequence[int] | None = None,
    host_memory_bytes: Sequence[int] = (AMPLE, AMPLE),
    num_micro_batches: int = 4,
    handover_s: float = 0.0,
    outer_s: float = 0.0,
) -> MappingProblem:
    """Devices of different speed, each under a root of its own unless hosts say otherwise."""
    return MappingProblem(
        layers=tuple(
            LayerNeeds(
                seconds=tuple(seconds / speed for speed in speeds),
                held_bytes=held_bytes,
                gradient_bytes=gradient_bytes,
                kept_bytes=1,
                host_bytes=10,
            )
            for seconds in layer_s
        ),
        devices=tuple(
            DevicePlace(
                host=hosts[number] if hosts else 0,
                root=number,
                memory_bytes=memory_bytes[number] if memory_bytes else AMPLE,
            )
            for number in range(len(speeds))
        ),
        host_memory_bytes=tuple(host_memory_bytes),
        num_micro_batches=num_micro_batches,
        handover_s=handover_s,
        outer_s=outer_s,
    )


def places_of(given: MappingProblem) -> list[tuple[int, int]]:
    return [(device.host, device.root) for device in given.devices]


def least_step_s(given: MappingProblem, num_stages: int | None = None) -> float | None:
    """Every way of cutting, one after the other; None if none fits."""
    order, num_layers = device_order(places_of(given)), len(given.layers)
    best = None
    numbers = [num_stages] if num_stages else range(len(order), num_layers + 1)
    for number in numbers:
        for inner in combinations(range(1, num_layers), number - 1):
            bounds = list(pairwise([0, *inner, num_layers]))
            loads = [0.0] * len(order)
            fits = True
            host_bytes = [0] * len(given.host_memory_bytes)
            for position, device in enumerate(order):
                own = [range(*bounds[stage]) for stage in range(position, number, len(order))]
                loads[position] = sum(
                    given.handover_s + sum(given.layers[layer].seconds[device] for layer in layers) for layers in own
                )
                held = [sum(given.layers[layer].held_bytes for layer in layers) for layers in own]
                most = max((a + b for a, b in pairwise(held)), default=held[0])
                kept = sum(given.layers[layer].kept_bytes for layers in own for layer in layers)
                most += max(sum(given.layers[layer].gradient_bytes for layer in layers) for layers in own)
                fits = fits and most + kept <= given.devices[device].memory_bytes
                host = given.devices[device].host
                host_bytes[host] += sum(given.layers[layer].host_bytes for layers in own for layer in layers)
            fits = fits and all(a <= b for a, b in zip(host_bytes, given.host_memory_bytes, strict=True))
            slots = given.num_micro_batches * number / len(order)
            step_s = max(loads) * (slots + len(order) - 1) / slots + given.outer_s / given.num_micro_batches
            step_s = max(step_s, loads[0] + given.outer_s)
            if fits and (best is None or step_s < best):
                best = step_s
    return best


@st.composite
def problems(draw: st.DrawFn) -> MappingProblem:
    num_devices = draw(st.integers(1, 3))
    num_layers = draw(st.integers(num_devices, 8))
    return problem(
        [draw(st.integers(1, 9)) for _ in range(num_layers)],
        [draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(num_devices)],
        held_bytes=draw(st.integers(0, 5)),
        gradient_bytes=draw(st.integers(0, 3)),
        memory_bytes=[draw(st.integers(4, 40)) for _ in range(num_devices)],
        hosts=[draw(st.integers(0, 1)) for _ in range(num_devices)],
        host_memory_bytes=[draw(st.integers(0, 90)) for _ in range(2)],
        num_micro_batches=draw(st.integers(1, 8)),
        handover_s=draw(st.sampled_from([0.0, 0.7])),
        outer_s=draw(st.sampled_from([0.0, 5.0])),
    )


@given(given_problem=problems())
def test_small_cases_are_exact(given_problem: MappingProblem) -> None:
    wanted = least_step_s(given_problem)
    if wanted is None:
        with pytest.raises(IsthmusError, match=r"memory: no way of cutting .* GiB are missing in the best one"):
            map_layers(given_problem)
        return
    found = map_layers(given_problem)
    assert found.is_exact and found.step_s == pytest.approx(wanted)


@given(given_problem=problems(), num_stages=st.integers(1, 8))
def test_what_is_found_is_a_mapping_that_takes_what_it_says(given_problem: MappingProblem, num_stages: int) -> None:
    num_layers, num_devices = len(given_problem.layers), len(given_problem.devices)
    number = min(max(num_stages, num_devices), num_layers)
    if least_step_s(given_problem, number) is None:
        return
    found = map_layers(given_problem, number)
    layers = [layer for stage in found.stages for layer in range(stage.first_layer, stage.last_layer + 1)]
    assert layers == list(range(num_layers)) and len(found.stages) == len(found.devices) == number
    loads = [0.0] * num_devices
    for stage, device in zip(found.stages, found.devices, strict=True):
        own = given_problem.layers[stage.first_layer : stage.last_layer + 1]
        loads[device] += given_problem.handover_s + sum(layer.seconds[device] for layer in own)
    order = device_order(places_of(given_problem))
    loads[order[0]] += given_problem.outer_s
    assert found.load_s == pytest.approx(loads)
    again = predict_cuts(given_problem, found.stages)
    assert again.step_s == found.step_s and again.short_bytes == 0
    assert list(found.devices) == [order[stage % num_devices] for stage in range(number)]


def test_what_is_searched_is_mostly_what_is_exact() -> None:
    random = Random(1)
    ratios = []
    for _ in range(40):
        speeds = [random.choice([0.5, 1.0, 2.0]) for _ in range(random.randint(2, 3))]
        layer_s = [random.randint(1, 9) for _ in range(random.randint(12, 15))]
        weigher = _Weigher(problem(layer_s, speeds, handover_s=0.5))
        for rounds in (1, 2, 3):
            exact, searched = weigher.best(rounds * len(speeds)), weigher._searched(rounds * len(speeds))
            assert exact.is_exact and not searched.is_exact
            ratios.append(searched.step_s / exact.step_s)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 0.9 * len(ratios)
    assert sum(ratios) <= 1.02 * len(ratios)


def test_hosts_are_not_mixed_and_on_each_neighbours_have_different_roots() -> None:
    places = [(1, 3), (0, 0), (1, 2), (0, 0), (1, 3), (1, 2)]
    assert device_order(places) == [1, 3, 0, 2, 4, 5]


def test_slower_devices_get_fewer_layers_and_devices_with_little_memory_too() -> None:
    uneven = map_layers(problem([1.0] * 12, [1.0, 3.0]), 2)
    assert [stage.last_layer - stage.first_layer + 1 for stage in uneven.stages] == [3, 9]
    tight = map_layers(problem([1.0] * 12, memory_bytes=[10, AMPLE]), 2)
    assert [stage.last_layer - stage.first_layer + 1 for stage in tight.stages] == [5, 7]
    hosts = map_layers(problem([1.0] * 12, hosts=[0, 1], host_memory_bytes=[40, 200]), 2)
    assert [stage.last_layer - stage.first_layer + 1 for stage in hosts.stages] == [4, 8]


def test_hand_overs_speak_for_fewer_stages_and_few_micro_batches_for_more() -> None:
    cheap, dear = (map_layers(problem([1.0] * 8, handover_s=seconds)) for seconds in (0.0, 2.0))
    assert len(cheap.stages) == 8 and len(dear.stages) == 2
    many = map_layers(problem([1.0] * 8, handover_s=0.3, num_micro_batches=100))
    few = map_layers(problem([1.0] * 8, handover_s=0.3, num_micro_batches=1))
    assert len(many.stages) < len(few.stages)


def sizes(mapping: StageMapping) -> list[int]:
    return [stage.last_layer - stage.first_layer + 1 for stage in mapping.stages]


def equal_stages(num_layers: int, num_stages: int) -> tuple[Stage, ...]:
    each = num_layers // num_stages
    return tuple(Stage(first_layer=at * each, last_layer=(at + 1) * each - 1) for at in range(num_stages))


def test_what_lies_outside_the_layers_moves_some_only_where_filling_and_draining_do_not_hide_it() -> None:
    hidden = map_layers(problem([1.0] * 8, outer_s=0.4, num_micro_batches=2), 2)
    shown = map_layers(problem([1.0] * 8, outer_s=4.0, num_micro_batches=8), 2)
    assert sizes(hidden) == [4, 4] and sizes(shown) == [3, 5]


@given(noise=st.lists(st.floats(0.975, 1.025), min_size=4, max_size=4), outer_s=st.floats(0.0, 0.5))
def test_devices_that_measure_a_few_percent_apart_keep_equal_stages(noise: list[float], outer_s: float) -> None:
    equal = equal_stages(32, 8)
    found = choose_cuts(problem([1.0] * 32, noise, outer_s=outer_s, num_micro_batches=8), equal)
    assert found.stages == equal


def test_devices_that_differ_get_other_stages_and_as_many() -> None:
    equal = equal_stages(8, 4)
    found = choose_cuts(problem([1.0] * 8, [1.0, 0.5]), equal)
    assert len(found.stages) == 4 and max(found.load_s) == 6.0 and sum(sizes(found)[1::2]) in (2, 3)
    assert found.step_s == map_layers(problem([1.0] * 8, [1.0, 0.5]), 4).step_s


def test_stages_that_do_not_fit_are_left_however_fast_and_kept_where_none_fit() -> None:
    equal = equal_stages(12, 2)
    # Six layers held and kept take 12 bytes.
    tight = choose_cuts(problem([1.0] * 12, memory_bytes=[10, AMPLE]), equal)
    assert sizes(tight) == [5, 7] and tight.short_bytes == 0
    hopeless = choose_cuts(problem([1.0] * 12, memory_bytes=[1, 1]), equal)
    assert hopeless.stages == equal and hopeless.short_bytes == 22
    with pytest.raises(IsthmusError, match="devices: got 2 for 1 layers"):
        choose_cuts(problem([1.0]), (Stage(first_layer=0, last_layer=0),))


def test_large_cases_are_balanced_and_the_same_every_time() -> None:
    layer_s = [1.0 + (layer * 7 % 5) / 10 for layer in range(64)]
    speeds = [1.0 + (device % 3) for device in range(16)]
    given_problem = problem(layer_s, speeds, hosts=[device // 8 for device in range(16)])
    found = map_layers(given_problem)
    assert not found.is_exact and found == map_layers(given_problem)
    fluid_s = sum(layer_s) / sum(speeds)
    assert fluid_s <= max(found.load_s) <= 1.6 * fluid_s


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "message"),
    [
        (1, None, "devices: got 2 for 1 layers, wanted one layer or more for each"),
        (4, 5, "num_stages: got 5, wanted 2, the devices, to 4, the layers"),
        (4, 1, "num_stages: got 1, wanted 2, the devices, to 4, the layers"),
    ],
)
def test_what_cannot_be_is_refused(num_layers: int, num_stages: int | None, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        map_layers(problem([1.0] * num_layers), num_stages)


def test_needs_that_contradict_one_another_are_refused() -> None:
    whole = problem([1.0] * 2)
    with pytest.raises(ValueError, match=r"layers\[0\].seconds: got 2, wanted 1"):
        MappingProblem(layers=whole.layers, devices=whole.devices[:1], host_memory_bytes=(1,), num_micro_batches=1)
    with pytest.raises(ValueError, match="host_memory_bytes: got 0 hosts, a device is of 0"):
        MappingProblem(layers=whole.layers, devices=whole.devices, host_memory_bytes=(), num_micro_batches=1)
