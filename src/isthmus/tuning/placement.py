"""Fits a model into an accelerator: what stays resident, how many slots are left for experts, which stages, which
policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.planning.memory import num_dense_buffers
from isthmus.planning.problem import CostModel
from isthmus.planning.stages import map_stages
from isthmus.profiling.activations import measure_saved_bytes
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


def place_dense(
    model: MoeModel,
    store: ParameterStore,
    accelerator: Accelerator,
    example: list[MicroBatch],
    policy: str,
    make: Callable[[int], DenseUnits],
) -> tuple[DenseUnits, int]:
    """(the dense units, all resident if the budget allows, else streamed; activation bytes of steps like ``example``).

    ``make(num_buffers)`` allocates them with weights to measure with. Raises ``BudgetError`` if even streamed they
    leave no room for activations and the policy's fewest slots; the model's parameters then lie in the store.
    """
    spec, activation_bytes = model.spec, None
    if not accelerator.is_separate:
        return make(spec.num_layers), 0
    slots_bytes = least_slots(model, policy) * model.slot_numel * torch_dtype(model.dtype).itemsize
    for num_buffers in sorted({spec.num_layers, num_dense_buffers(spec)}, reverse=True):
        needed_bytes = dense_bytes(store, num_buffers) + slots_bytes
        if needed_bytes > accelerator.budget_bytes:
            continue
        dense = make(num_buffers)
        activation_bytes = activations(model, example, accelerator)
        if needed_bytes + activation_bytes <= accelerator.budget_bytes:
            return dense, activation_bytes
        dense.free()
    if activation_bytes is None:
        # Not even the dense part fits: what autograd keeps is measured on the host.
        model.move_buffers(torch.device("cpu"))
        for key in (key for key in store.keys if not key.is_expert):
            model.bind(key, store.weight(key))
        activation_bytes = activations(model, example, accelerator)
    raise _budget_error(model, policy, accelerator.budget_bytes, activation_bytes, store)


def place(
    model: MoeModel,
    store: ParameterStore,
    accelerator: Accelerator,
    dense: DenseUnits,
    example: list[MicroBatch],
    *,
    activation_bytes: int,
    policy: str,
    num_stages: int | None,
    num_waves: int | None,
    num_cpu_threads: int,
    cpu_speed: float,
    progress: Callable[[str, float], None],
) -> Placement:
    """Plans for steps like ``example``, given what ``place_dense`` found. Blocks while measuring.

    Raises ``IsthmusError`` for an unknown policy or too many stages.
    """
    if policy not in POLICIES:
        raise IsthmusError(f"policy: got {policy!r}, wanted one of {', '.join(sorted(POLICIES))}.")
    spec = model.spec
    num_tokens = sum(batch.num_tokens for batch in example)
    measured = measure_profile(
        model,
        accelerator,
        example[0],
        max_tokens=num_tokens,
        num_cpu_threads=num_cpu_threads,
        progress=progress,
    )
    if not accelerator.is_separate:
        return _in_place(model, store, measured)
    profile = at_cpu_speed(measured, cpu_speed)
    num_waves = num_waves or min(2, len(example))
    plan = fit(model, accelerator, dense, activation_bytes, profile.copy_window, policy, num_stages, num_waves)
    seat = PolicySeat()
    loader = _make_loader(model, store, accelerator, plan, seat)
    setup = PolicySetup(
        spec=spec,
        costs=CostModel(profile, spec),
        plan=plan,
        loader=loader,
        num_tokens=num_tokens,
        recorder=accelerator.recorder,
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


def _in_place(model: MoeModel, store: ParameterStore, profile: Profile) -> Placement:
    """Without a separate memory there is nothing to decide: all micro-batches form one wave, experts run in place."""
    plan = Plan(
        policy=InPlace.name,
        stages=(Stage(first_layer=0, last_layer=model.spec.num_layers - 1),),
        num_slots=0,
        slot_bytes=0,
        dense_bytes=0,
        activation_bytes=0,
        copy_window=1,
        num_waves=1,
    )
    return Placement(plan=plan, profile=profile, loader=HostLoader(store.weight), policy=InPlace())


def fit(
    model: MoeModel,
    accelerator: Accelerator,
    dense: DenseUnits,
    activation_bytes: int,
    copy_window: int,
    policy: str,
    num_stages: int | None,
    num_waves: int,
) -> Plan:
    """Divides the accelerator's budget: dense part (already allocated), activations, the rest in slots of one
    expert."""
    slot_bytes = model.slot_numel * torch_dtype(model.dtype).itemsize
    free_bytes = accelerator.budget_bytes - accelerator.allocated_bytes - activation_bytes
    experts = [layer.num_experts for layer in model.spec.layers if layer is not None]
    num_slots = min(free_bytes // slot_bytes, sum(experts) + max(experts))
    return Plan(
        policy=policy,
        stages=map_stages(model.spec, num_slots=num_slots - max(experts), num_stages=num_stages),
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        dense_bytes=accelerator.allocated_bytes,
        activation_bytes=activation_bytes,
        copy_window=copy_window,
        num_waves=num_waves,
        is_dense_resident=dense.is_resident,
    )


def least_slots(model: MoeModel, policy: str) -> int:
    """Slots without which the policy cannot run: whole layers where it loads whole layers, and room for their
    gradients."""
    experts = [layer.num_experts for layer in model.spec.layers if layer is not None]
    return {
        "resident": sum(experts) + max(experts),
        "mobius": 2 * max(experts) + 1,
        "gpipe-offload": 2 * max(experts) + 1,
    }.get(policy, 2)


def _budget_error(
    model: MoeModel, policy: str, budget_bytes: int, activation_bytes: int, store: ParameterStore
) -> BudgetError:
    """The error that says what the least budget is and what it is made of."""
    slot_bytes, num_slots = model.slot_numel * torch_dtype(model.dtype).itemsize, least_slots(model, policy)
    num_layers, num_buffers = model.spec.num_layers, num_dense_buffers(model.spec)
    least_bytes = dense_bytes(store, num_buffers)
    minimum = least_bytes + activation_bytes + num_slots * slot_bytes
    at_once = f" (of {num_buffers} of the {num_layers} layers at a time)" if num_buffers < num_layers else ""
    return BudgetError(
        f"accelerator_memory: {budget_bytes} bytes are under the minimum of {minimum} ({minimum / 2**20:.1f} MiB) for "
        f"policy {policy}: dense weights and gradients {least_bytes / 2**20:.1f} MiB{at_once}, activations "
        f"{activation_bytes / 2**20:.1f} MiB, {num_slots} experts of {slot_bytes / 2**20:.2f} MiB. Raise "
        "--accelerator-memory to at least the minimum, lower --seq-len, --micro-batch-size or --micro-batches, or take "
        "a policy that loads less.",
        minimum,
    )


def activations(model: MoeModel, example: list[MicroBatch], accelerator: Accelerator) -> int:
    """Accelerator bytes of one step's activations: what the dense part saves, the experts' inputs, results and
    intermediate values, and the rows of weight gradients that one layer leaves to the next."""
    spec, item = model.spec, torch_dtype(model.dtype).itemsize
    saved = max(measure_saved_bytes(model, batch.inputs) for batch in example) * len(example)
    num_tokens = sum(batch.num_tokens for batch in example)
    experts = [layer for layer in spec.layers if layer is not None]
    kept = sum(num_tokens * layer.hidden_size * item for layer in experts)
    widest = max(layer.top_k * (7 * layer.hidden_size + 9 * layer.intermediate_size) for layer in experts)
    scratch = scratch_bytes(model) if should_group(model, accelerator) else 0
    return saved + kept + num_tokens * widest * item + scratch


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
