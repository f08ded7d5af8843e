"""Layers to stages, stages to devices (APTMoE, section 3), and whether it all fits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from isthmus.planning.stages import map_stages
from isthmus.simulation.tuning.costs import Costs
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
