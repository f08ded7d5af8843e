"""What mapping layers to stages starts from (``mapping.py``): seconds of every layer on every device, from what was
measured there or from figures, and the memory that the runtime's own rules (``memory.py``) ask for.

Legend: ``L`` layers, ``D`` devices, ``T`` tokens of a micro-batch, ``M`` micro-batches of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from isthmus.planning.block_seconds import MESSAGE_BYTES_PER_S, MESSAGE_S, Costs
from isthmus.planning.mapping import DevicePlace, LayerNeeds, MappingProblem
from isthmus.planning.memory import (
    Blueprint,
    dense_bytes,
    experts_bytes,
    experts_of,
    host_bytes,
    least_slots,
)
from isthmus.planning.problem import BYTES_PER_VALUE, CostModel, LayerProblem
from isthmus.spec.model import OUTER_LAYER, ExpertSpec, UnitKey, UnitLayout
from isthmus.spec.profile import Profile

MAPPED_POLICY = "affinity"
"""Whose layers are mapped by time. The other policies are there to compare with: they cut evenly, as published."""
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a device is. ``memory_bytes`` None: it has none of its own, experts are computed in place."""

    host: int
    root: int
    memory_bytes: int | None


def pass_s(problem: LayerProblem) -> float:
    """Seconds of one layer in one pass where accelerator, link and CPU work at once, each without a pause: with the
    number of experts on the accelerator, most popular first, with which the busiest of them ends soonest."""
    by_count = sorted(range(problem.num_experts), key=lambda expert: (-problem.counts[expert], expert))
    here_s = [0.0, *accumulate(problem.accelerator_s[expert] for expert in by_count)]
    cpu_s = [0.0, *accumulate(problem.cpu_s[expert] for expert in by_count)]
    load_s = max(problem.load_s, problem.unload_s)
    return min(
        max(problem.dense_s + here_s[on], on * load_s, problem.optimizer_s + cpu_s[-1] - cpu_s[on])
        for on in range(problem.num_experts + 1)
    )


def layer_seconds(profile: Profile, blueprint: Blueprint, num_micro_batches: int) -> tuple[float, ...]:
    """(L,) seconds of each layer in a step on the device of ``profile``, all experts being equally popular. In place
    everything is done one after the other, micro-batch by micro-batch; else accelerator, link and CPU work at once."""
    costs = Costs(profile, blueprint.spec)
    in_place = profile.hardware.link is None
    seconds = _in_place_s if in_place else _beside_s
    return tuple(seconds(costs, blueprint, layer, num_micro_batches) for layer in range(blueprint.spec.num_layers))


def _in_place_s(costs: Costs, blueprint: Blueprint, layer: int, num_micro_batches: int) -> float:
    spec, profile, num_tokens = blueprint.spec, costs.profile, blueprint.num_tokens
    seconds = 0.0
    for is_backward in (False, True):
        seconds += costs.dense_s(num_tokens, is_backward=is_backward) * profile.dense_slowdown.alone
        if (expert := spec.layers[layer]) is not None:
            seconds += costs.routing_s(layer, num_tokens, is_backward=is_backward)
            experts_s = costs.experts_s(layer, _rows(expert, num_tokens), is_backward=is_backward, on_cpu=False)
            seconds += sum(experts_s) * profile.accelerator_slowdown.alone
    numel = spec.layer_numel(layer)
    return num_micro_batches * seconds + costs.steps_s(numel) + costs.norm_s(numel)


def _beside_s(costs: Costs, blueprint: Blueprint, layer: int, num_micro_batches: int) -> float:
    spec, num_tokens = blueprint.spec, blueprint.num_tokens
    expert = spec.layers[layer]
    optimizer_s = costs.steps_s(spec.layer_numel(layer))
    total_s = 0.0
    for is_backward in (False, True):
        dense_s = num_micro_batches * costs.dense_s(num_tokens, is_backward=is_backward)
        if expert is None:
            total_s += max(dense_s, 0.0 if is_backward else optimizer_s)
            continue
        counts = [round(rows * num_micro_batches) for rows in _rows(expert, num_tokens)]
        problem = CostModel(costs.profile, spec).problem(
            layer, counts, is_backward=is_backward, num_parts=num_micro_batches
        )
        total_s += pass_s(replace(problem, dense_s=dense_s, optimizer_s=0.0 if is_backward else optimizer_s))
    return total_s


def outer_seconds(profile: Profile, blueprint: Blueprint, num_micro_batches: int) -> float:
    """Of what lies outside every layer, in a step. In place with its part of the optimizer, which else is the CPU's."""
    costs, num_tokens = Costs(profile, blueprint.spec), blueprint.num_tokens
    both_s = sum(costs.outer_s(num_tokens, is_backward=is_backward) for is_backward in (False, True))
    if profile.hardware.link is not None:
        return num_micro_batches * both_s
    numel = blueprint.spec.outer_numel
    stepped_s = costs.steps_s(numel) + costs.norm_s(numel)
    return num_micro_batches * both_s * profile.dense_slowdown.alone + stepped_s


def profiled_problem(
    blueprint: Blueprint,
    devices: Sequence[tuple[Place, Profile]],
    host_memory_bytes: Sequence[int],
    num_micro_batches: int,
    num_in_flight: int,
) -> MappingProblem:
    """Of devices that were measured, the first of which has what lies outside every layer."""
    num_bytes = blueprint.num_tokens * blueprint.spec.hidden_size * BYTES_PER_VALUE[blueprint.dtype]
    # In and out, there and back: of each two messages are this device's.
    handover_s = num_micro_batches * (4 * MESSAGE_S + 2 * num_bytes / MESSAGE_BYTES_PER_S)
    return mapping_problem(
        blueprint,
        [place for place, _ in devices],
        [layer_seconds(profile, blueprint, num_micro_batches) for _, profile in devices],
        host_memory_bytes,
        num_micro_batches,
        num_in_flight,
        handover_s=handover_s if len(devices) > 1 else 0.0,
        outer_s=outer_seconds(devices[0][1], blueprint, num_micro_batches),
    )


def mapping_problem(
    blueprint: Blueprint,
    places: Sequence[Place],
    seconds_DL: Sequence[Sequence[float]],
    host_memory_bytes: Sequence[int],
    num_micro_batches: int,
    num_in_flight: int,
    *,
    handover_s: float = 0.0,
    outer_s: float = 0.0,
) -> MappingProblem:
    """Memory by the runtime's rules for ``MAPPED_POLICY``: dense parts stay, experts come one by one, activations are
    those of ``num_in_flight`` micro-batches, the fewest that must fit. What autograd saves in two layers counts in
    both, so a little more is asked for than is needed."""
    spec = blueprint.spec
    layouts: dict[int, dict[UnitKey, UnitLayout]] = {layer: {} for layer in (OUTER_LAYER, *range(spec.num_layers))}
    for key, layout in blueprint.layouts.items():
        layouts[key.layer][key] = layout
    outer, hosts = layouts[OUTER_LAYER], list(host_memory_bytes)
    hosts[places[0].host] -= sum(host_bytes(outer.values()).values())
    saved = sum({**blueprint.saved.before, **blueprint.saved.after}.values())
    first_bytes = dense_bytes(outer, 1) + saved * num_in_flight
    taken_bytes = _taken_bytes(blueprint, num_in_flight)
    devices = [
        DevicePlace(
            host=place.host,
            root=place.root,
            memory_bytes=UNLIMITED_BYTES
            if place.memory_bytes is None
            else place.memory_bytes - taken_bytes - (0 if number else first_bytes),
        )
        for number, place in enumerate(places)
    ]
    layers = [
        LayerNeeds(
            seconds=tuple(seconds_L[layer] for seconds_L in seconds_DL),
            held_bytes=0,
            kept_bytes=_kept_bytes(blueprint, layer, layouts[layer], num_in_flight),
            host_bytes=sum(host_bytes(layouts[layer].values()).values()),
        )
        for layer in range(spec.num_layers)
    ]
    return MappingProblem(
        layers=tuple(layers),
        devices=tuple(devices),
        host_memory_bytes=tuple(hosts),
        num_micro_batches=num_micro_batches,
        handover_s=handover_s,
        outer_s=outer_s,
    )


def _kept_bytes(blueprint: Blueprint, layer: int, layouts: dict[UnitKey, UnitLayout], num_in_flight: int) -> int:
    """Of one layer on its accelerator, the whole step: dense weights and gradients, what autograd saves, experts'
    inputs."""
    expert = blueprint.spec.layers[layer]
    inputs = 0 if expert is None else expert.hidden_size * blueprint.num_tokens * BYTES_PER_VALUE[blueprint.dtype]
    saved = sum(blueprint.saved.layers[layer].values())
    return dense_bytes(layouts, 1) + num_in_flight * (saved + inputs)


def _taken_bytes(blueprint: Blueprint, num_in_flight: int) -> int:
    """Of every accelerator, whatever layers it has: the widest layer's inner values, and the fewest slots."""
    value_bytes, num_tokens = BYTES_PER_VALUE[blueprint.dtype], blueprint.num_tokens * num_in_flight
    experts = {layer for layer in blueprint.spec.layers if layer is not None}
    widest = max(
        (experts_bytes([e], num_tokens, value_bytes) - num_tokens * e.hidden_size * value_bytes for e in experts),
        default=0,
    )
    slot_bytes = max((expert.numel for expert in experts), default=0) * value_bytes
    return widest + least_slots(MAPPED_POLICY, experts_of(blueprint.spec), 0) * slot_bytes


def _rows(expert: ExpertSpec, num_tokens: int) -> list[float]:
    """(E,) of a micro-batch, every expert being as popular as the others."""
    return [num_tokens * expert.top_k / expert.num_experts] * expert.num_experts
