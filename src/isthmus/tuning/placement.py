"""Fits a model into an accelerator: what stays resident, how many slots are left for experts, which stages, which
policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.planning.flights import largest_flight, smallest_flight
from isthmus.planning.memory import (
    experts_bytes,
    experts_of,
    least_slots,
    most_with_gradients,
    num_dense_buffers,
)
from isthmus.planning.problem import CostModel
from isthmus.planning.stages import map_stages
from isthmus.profiling.activations import measure_saved_bytes
from isthmus.profiling.dense import Forward, loss_of
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Plan, Stage
from isthmus.spec.profile import Profile
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.data.batches import MicroBatch
from isthmus.tuning.dense import DenseUnits, dense_bytes
from isthmus.tuning.grouped import scratch_bytes, should_group
from isthmus.tuning.loader import ExpertLoader, HostLoader
from isthmus.tuning.measure import at_cpu_speed, measure_profile
from isthmus.tuning.parameter_store import ParameterStore
from isthmus.tuning.policies import POLICIES, PREDICTING, InPlace, PolicySeat, PolicySetup
from isthmus.tuning.predictor import PopularityPredictor
from isthmus.tuning.protocols import Loader, Policy


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one of several processes has of a model: its stages, in the order they run, and how to run its layers alone,
    to be measured. All micro-batches pass through a stage one by one, so all its layers hold gradients at once."""

    stages: tuple[Stage, ...]
    run: Forward
    least: Callable[[int], int]
    """The least of what all processes say; all must ask."""


class BudgetError(IsthmusError):
    """The accelerator's budget is under what the policy needs, ``minimum_bytes``."""

    def __init__(self, message: str, minimum_bytes: int) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where everything is and will be."""

    plan: Plan
    profile: Profile
    loader: Loader
    policy: Policy
    predictor: PopularityPredictor | None = None
    setup: PolicySetup | None = None
    """What other policies would need to take this one's place; None where there is nothing to decide."""


@dataclass(frozen=True)
class Room:
    """For micro-batches whose activations are kept at once."""

    num_in_flight: int
    activation_bytes: int


def place_dense(
    model: MoeModel,
    store: ParameterStore,
    accelerator: Accelerator,
    example: list[MicroBatch],
    policy: str,
    make: Callable[[int], DenseUnits],
    part: Part | None = None,
    num_in_flight: int | None = None,
) -> tuple[DenseUnits, Room]:
    """(the dense units, room for activations of steps like ``example``). As many micro-batches are in flight as leave
    room for the policy's fewest slots, or as ``num_in_flight`` says; beside them all dense units are resident if the
    budget allows, else streamed.

    ``make(num_buffers)`` allocates them with weights to measure with. Raises ``BudgetError`` if even streamed they
    leave no room for the least activations and the policy's fewest slots; the model's parameters then lie in the store.
    A ``part`` is never streamed. Of several processes all get the least number in flight.
    """
    spec, number = model.spec, len(example)
    if not accelerator.is_separate:
        return make(spec.num_layers), Room(smallest_flight(number, num_in_flight or number), 0)
    slots_bytes = least_slots_of(model, policy, part) * model.slot_numel * torch_dtype(model.dtype).itemsize
    choices = sorted({spec.num_layers} if part else {spec.num_layers, num_dense_buffers(spec)}, reverse=True)
    left_bytes = {n: accelerator.budget_bytes - dense_bytes(store, n) - slots_bytes for n in choices}
    num_buffers = next((n for n in choices if left_bytes[n] >= 0), None)
    dense = None if num_buffers is None else make(num_buffers)
    if dense is None:
        # Not even the dense part fits: what autograd keeps is measured on the host.
        model.move_buffers(torch.device("cpu"))
        for key in (key for key in store.keys if not key.is_expert):
            model.bind(key, store.weight(key))
    needed = activations(model, example, accelerator, part)
    size = largest_flight(number, lambda size: needed(size) <= max(left_bytes.values()), num_in_flight)
    if size is None:
        if dense is not None:
            dense.free()
        least = smallest_flight(number, num_in_flight)
        raise _budget_error(model, policy, accelerator.budget_bytes, Room(least, needed(least)), store, part)
    if part:
        size = part.least(size)
    num_buffers = next(n for n in choices if needed(size) <= left_bytes[n])
    if dense is None or dense.num_buffers != num_buffers:
        if dense is not None:
            dense.free()
        dense = make(num_buffers)
    return dense, Room(size, needed(size))


def place(
    model: MoeModel,
    store: ParameterStore,
    accelerator: Accelerator,
    dense: DenseUnits,
    example: list[MicroBatch],
    *,
    room: Room,
    policy: str,
    num_stages: int | None,
    num_waves: int | None,
    num_cpu_threads: int,
    cpu_speed: float,
    progress: Callable[[str, float], None],
    part: Part | None = None,
) -> Placement:
    """Plans for steps like ``example``, given what ``place_dense`` found. Blocks while measuring.

    Raises ``IsthmusError`` for an unknown policy or too many stages.
    """
    if policy not in POLICIES:
        raise IsthmusError(f"policy: got {policy!r}, wanted one of {', '.join(sorted(POLICIES))}.")
    spec = model.spec
    num_tokens = sum(batch.num_computed_tokens for batch in example)
    measured = measure_profile(
        model,
        accelerator,
        example[0],
        max_tokens=num_tokens,
        num_cpu_threads=num_cpu_threads,
        run=part.run if part else loss_of,
        progress=progress,
    )
    if not accelerator.is_separate or not spec.moe_layers:
        return _in_place(model, store, measured, room, part)
    profile = at_cpu_speed(measured, cpu_speed)
    num_waves = room.num_in_flight if part else num_waves or min(2, room.num_in_flight)
    plan = fit(model, accelerator, dense, room, profile.copy_window, policy, num_stages, num_waves, part)
    seat = PolicySeat()
    loader = _make_loader(model, store, accelerator, plan, seat)
    setup = PolicySetup(
        spec=spec,
        costs=CostModel(profile, spec),
        plan=plan,
        loader=loader,
        num_tokens=num_tokens * room.num_in_flight // len(example),
        recorder=accelerator.recorder,
        is_pipelined=part is not None,
        predictor=make_predictor(model, store, accelerator),
    )
    seat.policy = POLICIES[policy](setup)
    return Placement(
        plan=plan,
        profile=profile,
        loader=loader,
        policy=seat,
        predictor=setup.predictor if policy in PREDICTING else None,
        setup=setup,
    )


def _make_loader(
    model: MoeModel, store: ParameterStore, accelerator: Accelerator, plan: Plan, seat: PolicySeat
) -> ExpertLoader:
    """Takes the plan's memory: activations are announced, slots allocated."""
    accelerator.reserve(plan.activation_bytes)
    return ExpertLoader(
        accelerator,
        num_slots=plan.num_slots,
        slot_numel=model.slot_numel,
        dtype=torch_dtype(model.dtype),
        source=store.weight,
        window=plan.copy_window,
        next_use=seat.next_use,
    )


def _in_place(model: MoeModel, store: ParameterStore, profile: Profile, room: Room, part: Part | None) -> Placement:
    """Without a separate memory, or without experts, there is nothing to decide: experts run in place, where all
    micro-batches pass together those of all form one wave."""
    plan = Plan(
        policy=InPlace.name,
        stages=part.stages if part else (Stage(first_layer=0, last_layer=model.spec.num_layers - 1),),
        num_slots=0,
        slot_bytes=0,
        dense_bytes=0,
        activation_bytes=0,
        copy_window=1,
        num_waves=1,
        num_in_flight=room.num_in_flight,
    )
    return Placement(plan=plan, profile=profile, loader=HostLoader(store.weight), policy=InPlace())


def fit(
    model: MoeModel,
    accelerator: Accelerator,
    dense: DenseUnits,
    room: Room,
    copy_window: int,
    policy: str,
    num_stages: int | None,
    num_waves: int,
    part: Part | None,
) -> Plan:
    """Divides the accelerator's budget: dense part (already allocated), activations, the rest in slots of one
    expert."""
    slot_bytes = model.slot_numel * torch_dtype(model.dtype).itemsize
    free_bytes = accelerator.budget_bytes - accelerator.allocated_bytes - room.activation_bytes
    experts = experts_of(model.spec)
    stages = part.stages if part else ()
    num_slots = min(free_bytes // slot_bytes, sum(experts) + most_with_gradients(experts, stages))
    return Plan(
        policy=policy,
        stages=stages or map_stages(model.spec, num_slots=num_slots - max(experts), num_stages=num_stages),
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        dense_bytes=accelerator.allocated_bytes,
        activation_bytes=room.activation_bytes,
        copy_window=copy_window,
        num_waves=num_waves,
        num_in_flight=room.num_in_flight,
        is_dense_resident=dense.is_resident,
    )


def least_slots_of(model: MoeModel, policy: str, part: Part | None = None) -> int:
    """Slots without which the policy cannot run the model, or a ``part``, which has gradients of a whole stage."""
    experts = experts_of(model.spec)
    return least_slots(policy, experts, most_with_gradients(experts, part.stages if part else ()))


def _budget_error(
    model: MoeModel, policy: str, budget_bytes: int, room: Room, store: ParameterStore, part: Part | None
) -> BudgetError:
    """The error that says what the least budget is and what it is made of."""
    slot_bytes, num_slots = model.slot_numel * torch_dtype(model.dtype).itemsize, least_slots_of(model, policy, part)
    num_layers, num_buffers = model.spec.num_layers, num_dense_buffers(model.spec)
    if part:
        num_buffers = num_layers
    least_bytes = dense_bytes(store, num_buffers)
    minimum = least_bytes + room.activation_bytes + num_slots * slot_bytes
    one, lower = (
        ("one micro-batch", "")
        if room.num_in_flight == 1
        else (f"{room.num_in_flight} micro-batches", ", --micro-batches-in-flight")
    )
    at_once = f" (of {num_buffers} of the {num_layers} layers at a time)" if num_buffers < num_layers else ""
    return BudgetError(
        f"accelerator_memory: {budget_bytes} bytes are under the minimum of {minimum} ({minimum / 2**20:.1f} MiB) for "
        f"policy {policy}: dense weights and gradients {least_bytes / 2**20:.1f} MiB{at_once}, activations of {one} "
        f"{room.activation_bytes / 2**20:.1f} MiB, {num_slots} experts of {slot_bytes / 2**20:.2f} MiB. Raise "
        f"--accelerator-memory to at least the minimum, lower --seq-len, --micro-batch-size{lower}, or take a policy "
        "that loads less.",
        minimum,
    )


def activations(
    model: MoeModel, example: list[MicroBatch], accelerator: Accelerator, part: Part | None = None
) -> Callable[[int], int]:
    """Accelerator bytes of activations by number of micro-batches in flight: what the dense part saves, and what
    experts take. Measures once."""
    run = part.run if part else loss_of
    distinct = {id(batch): batch for batch in example}.values()
    saved_bytes = max(measure_saved_bytes(model, batch.inputs, run) for batch in distinct)
    num_tokens = sorted((batch.num_computed_tokens for batch in example), reverse=True)
    experts = [layer for layer in model.spec.layers if layer is not None]
    scratch = scratch_bytes(model) if should_group(model, accelerator) else 0
    value_bytes = torch_dtype(model.dtype).itemsize
    return lambda size: saved_bytes * size + experts_bytes(experts, sum(num_tokens[:size]), value_bytes) + scratch


def make_predictor(model: MoeModel, store: ParameterStore, accelerator: Accelerator) -> PopularityPredictor:
    """Starts from the routers' own weights (APTMoE, section 4.2): the store's, since on the accelerator there may be
    another layer's in their place."""
    tensors = {name: tensor for key in store.keys if not key.is_expert for name, tensor in store.named(key).items()}
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    routers: dict[int, tuple[Tensor, int]] = {}
    for layer in model.spec.moe_layers[1:]:
        weights = [parameter for parameter in model.routers[layer].parameters() if parameter.dim() == 2]
        routers[layer] = (tensors[names[weights[0]]], model.moe_parts[layer].spec.top_k)
    return PopularityPredictor(routers, device=accelerator.device)
