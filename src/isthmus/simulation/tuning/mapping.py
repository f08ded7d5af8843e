"""Layers to stages, stages to devices (APTMoE, section 3), and whether it all fits.

The published policies cut evenly (``stages_for``). Ours has its layers where they take least (``by_time``), by the rule
of the runtime (``planning/mapping.py``), from what a cluster's figures say instead of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from isthmus.planning.layer_needs import pass_s
from isthmus.planning.mapping import DevicePlace, LayerNeeds, MappingProblem, choose_cuts
from isthmus.planning.stages import map_stages
from isthmus.simulation.tuning.costs import Costs, LayerCosts
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Stage

DEFAULT_ROUNDS = 2
"""Stages of every device where their number is not given and memory allows."""
RESIDENT_FP32 = 3
"""Gradient and Adam's two moments beside the weights where everything stays on the accelerators."""


def stages_for(costs: Costs, num_stages: int | None) -> tuple[Stage, ...]:
    """``num_stages`` stages; None: ``DEFAULT_ROUNDS`` for each device, or more if two do not fit a device together.

    Raises ``IsthmusError`` for fewer stages than devices, more than layers, or stages of which two do not fit.
    """
    num_layers, num_devices = costs.spec.num_layers, costs.num_devices
    if num_devices > num_layers:
        raise IsthmusError(
            f"num_devices: got {num_devices} for {num_layers} layers, wanted one layer or more for each; take fewer"
        )
    if num_stages is not None:
        if not num_devices <= num_stages <= num_layers:
            raise IsthmusError(
                f"num_stages: got {num_stages}, wanted {num_devices}, the accelerators, to {num_layers}, the layers; "
                "leave it out to have it chosen"
            )
        stages = map_stages(costs.spec, num_slots=0, num_stages=num_stages)
        short = _short_bytes(costs, stages)
        if short > 0:
            raise IsthmusError(
                f"num_stages: got {num_stages}, of which two do not fit an accelerator together: "
                f"{short / 2**30:.1f} GiB are missing; raise --num-stages, or lower --batch or --seq-len"
            )
        return stages
    # Whole rounds, so that no device has a stage more than others; a layer each if even that is too much.
    for number in [*range(DEFAULT_ROUNDS * num_devices, num_layers, num_devices), num_layers]:
        stages = map_stages(costs.spec, num_slots=0, num_stages=number)
        short = _short_bytes(costs, stages)
        if short <= 0:
            return stages
    raise IsthmusError(
        f"memory: two layers' weights and a step's activations do not fit an accelerator: {short / 2**30:.1f} GiB are "
        "missing; lower --batch or --seq-len, or take accelerators with more memory"
    )


def by_time(costs: Costs, ways: Sequence[Sequence[Stage]]) -> list[tuple[Stage, ...]]:
    """Of each of ``ways`` those stages, or as many others, if devices differ enough for those to be shorter, or memory
    asks for it."""
    problem, found = _problem(costs), []
    for equal in ways:
        mapped = choose_cuts(problem, equal).stages
        is_roomier = _short_bytes(costs, mapped) <= max(0, _short_bytes(costs, equal))
        found.append(mapped if is_roomier else tuple(equal))
    return found


def own_stages(costs: Costs, num_stages: int | None) -> tuple[Stage, ...]:
    """Of our policy: by time, also where equal stages do not fit. Raises as ``stages_for``."""
    try:
        return by_time(costs, [stages_for(costs, num_stages)])[0]
    except IsthmusError:
        num_layers, num_devices = costs.spec.num_layers, costs.num_devices
        rounds = [*range(DEFAULT_ROUNDS * num_devices, num_layers, num_devices), num_layers]
        for number in rounds if num_stages is None else [num_stages]:
            if num_devices <= number <= num_layers:
                mapped = by_time(costs, [map_stages(costs.spec, num_slots=0, num_stages=number)])[0]
                if _short_bytes(costs, mapped) <= 0:
                    return mapped
        raise


def layer_seconds(costs: Costs) -> list[list[float]]:
    """(D, L) seconds of each layer in a step on each device, all experts being equally popular."""
    known: dict[int, float] = {}

    def seconds(layer: int, of: LayerCosts) -> float:
        if id(of) not in known:
            known[id(of)] = _layer_s(costs, layer, of)
        return known[id(of)]

    layers = range(costs.spec.num_layers)
    return [[seconds(layer, costs.layer(device, layer)) for layer in layers] for device in range(costs.num_devices)]


def _layer_s(costs: Costs, layer: int, of: LayerCosts) -> float:
    expert, dense_s = costs.spec.layers[layer], [of.num_parts * seconds for seconds in of.dense_s]
    if expert is None:
        return max(dense_s[0], of.optimizer_s) + dense_s[1]
    counts = [costs.job.num_tokens * expert.top_k / expert.num_experts] * expert.num_experts
    forward, backward = (of.problem(counts, is_backward=is_backward) for is_backward in (False, True))
    return pass_s(replace(forward, optimizer_s=of.optimizer_s)) + pass_s(backward)


def _problem(costs: Costs) -> MappingProblem:
    """With what the simulator asks for: see ``_short_bytes``."""
    seconds_DL, spec = layer_seconds(costs), costs.spec
    one_layer = costs.activation_bytes(1) - costs.activation_bytes(0)
    per_parameter = costs.host_bytes() / spec.num_parameters
    return MappingProblem(
        layers=tuple(
            LayerNeeds(
                seconds=tuple(seconds_L[layer] for seconds_L in seconds_DL),
                held_bytes=costs.stage_bytes(layer, layer),
                gradient_bytes=costs.stage_bytes(layer, layer),
                kept_bytes=one_layer,
                host_bytes=round(costs.numel(layer) * per_parameter),
            )
            for layer in range(spec.num_layers)
        ),
        devices=tuple(
            DevicePlace(
                host=seat.host_number,
                root=seat.root,
                memory_bytes=seat.host.accelerator.memory_bytes - costs.activation_bytes(0),
            )
            for seat in costs.seats
        ),
        host_memory_bytes=costs.host_memory_bytes,
        num_micro_batches=costs.job.num_micro_batches,
    )


def other_mappings(costs: Costs, stages: Sequence[Stage]) -> list[tuple[Stage, ...]]:
    """What may be taken instead of ``stages``: 1, 2, 4, … stages for each device, as far as two fit one together."""
    found: list[tuple[Stage, ...]] = []
    number = costs.num_devices
    while number <= costs.spec.num_layers:
        mapped = map_stages(costs.spec, num_slots=0, num_stages=number)
        if mapped != tuple(stages) and _short_bytes(costs, mapped) <= 0:
            found.append(mapped)
        number *= 2
    return found


def _short_bytes(costs: Costs, stages: Sequence[Stage]) -> int:
    """What the device that has least is short of: two stages' weights, the gradients of one, activations. Micro-batches
    pass a whole stage one after the other, so all its layers' gradients are there until the last has passed."""
    num_devices = costs.num_devices
    stage_bytes = [costs.stage_bytes(stage.first_layer, stage.last_layer) for stage in stages]
    shorts = []
    for position, device in enumerate(costs.order):
        own = range(position, len(stages), num_devices)
        held = max((stage_bytes[a] + stage_bytes[b] for a, b in pairwise(own)), default=stage_bytes[own[0]])
        gradients = max(stage_bytes[number] for number in own)
        layers = sum(stages[number].last_layer - stages[number].first_layer + 1 for number in own)
        memory = costs.seats[device].host.accelerator.memory_bytes
        shorts.append(held + gradients + costs.activation_bytes(layers) - memory)
    return max(shorts)


def resident_short_bytes(costs: Costs, stages: Sequence[Stage]) -> int:
    """Likewise where all weights, gradients and moments stay on the accelerators; 0 or less: they fit."""
    num_devices = costs.num_devices
    shorts = []
    for position, device in enumerate(costs.order):
        own = [stages[number] for number in range(position, len(stages), num_devices)]
        weights = sum(costs.stage_bytes(stage.first_layer, stage.last_layer) for stage in own)
        layers = sum(stage.last_layer - stage.first_layer + 1 for stage in own)
        numel = sum(costs.numel(layer) for stage in own for layer in range(stage.first_layer, stage.last_layer + 1))
        needed = weights + RESIDENT_FP32 * 4 * numel + costs.activation_bytes(layers)
        shorts.append(needed - costs.seats[device].host.accelerator.memory_bytes)
    return max(shorts)


def check_hosts(costs: Costs) -> None:
    """Raises ``IsthmusError`` if weights, gradients and Adam's moments do not fit the hosts' memory together."""
    needed = costs.host_bytes()
    there = sum(host.count * host.memory_bytes for host in costs.cluster.hosts)
    if needed > there:
        raise IsthmusError(
            f"memory: weights, gradients and Adam's moments take {needed / 2**30:.0f} GiB, the hosts have "
            f"{there / 2**30:.0f} together; wanted hosts with more memory, or more of them (hosts.memory_bytes)"
        )
