"""A lower bound on a training step's seconds, whatever decides where experts run: the measure of every run.

The relaxation: only four resources count (CPU, both link directions, accelerator), each works without a pause, and
every expert may be split between CPU and accelerator in any fraction, separately in forward and backward. The least
seconds T such that no resource works longer than T is a linear program. By duality, any prices λ ≥ 0 with Σ λ = 1 give

    T ≥ min over assignments of Σ_r λ_r · (seconds of resource r),

where every expert takes its own cheapest assignment: a true bound even if λ is not optimal. The right side is concave
in λ; the ellipsoid method finds its maximum (three free prices, linear convergence). The resources' seconds are those
of "The bound" in APTMoE's facts, from measured curves instead of peak rates.

Legend: ``L`` MoE layers, ``E`` experts, ``A`` = 4 assignments of one expert, ``R`` = 4 resources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.curves import evaluate
from isthmus.planning.problem import BYTES_PER_VALUE, expert_times
from isthmus.spec.model import ModelSpec
from isthmus.spec.profile import Profile

Floats = NDArray[np.float64]

RESOURCES = ("cpu", "h2d", "d2h", "accelerator")
MAX_CUTS = 160
TOLERANCE = 1e-4
"""The search ends when no prices in the ellipsoid can raise the bound by more than this share of it."""


@dataclass(frozen=True, kw_only=True)
class StepBound:
    """``seconds``: no step is faster. ``limiting``: the resource (one of ``RESOURCES``) with the highest price.

    The four sums are the resources' seconds in the most balanced assignment that the search met.
    """

    seconds: float
    limiting: str
    cpu_s: float
    h2d_s: float
    d2h_s: float
    accelerator_s: float


def step_bound(
    profile: Profile,
    spec: ModelSpec,
    counts_LE: Mapping[int, Sequence[int]],
    *,
    num_tokens: int,
    num_slots: int,
    num_optimizer_parameters: int,
    dense_h2d_bytes: int = 0,
    dense_d2h_bytes: int = 0,
) -> StepBound:
    """The bound for a step in which layer ``l``'s experts got ``counts_LE[l]`` tokens (in forward, and again in
    backward).

    ``num_tokens``: tokens of the step, all micro-batches. ``num_slots``: experts whose weights may stay on the
    accelerator from forward to backward; none stay across the optimizer, which changes them. ``dense_*_bytes``: dense
    weights brought up after the optimizer, dense gradients brought down. An accelerator without its own memory (rates
    of 0) shares nothing with the CPU here, so the bound stays true. Raises ``ValueError`` for a layer without experts
    or a shape not in the profile.
    """
    constant_R = np.array(
        [
            num_optimizer_parameters * profile.optimizer_s_per_parameter,
            dense_h2d_bytes * min(profile.h2d_s_per_byte, profile.h2d_duplex_s_per_byte),
            dense_d2h_bytes * min(profile.d2h_s_per_byte, profile.d2h_duplex_s_per_byte),
            num_tokens * spec.num_layers * (profile.dense_forward_s_per_token + profile.dense_backward_s_per_token),
        ]
    )
    parts = [_layer_seconds(profile, spec, layer, counts) for layer, counts in sorted(counts_LE.items())]
    forward_load_s = np.concatenate([load_s for load_s, _ in parts]) if parts else np.zeros(0)
    seconds_EAR = np.concatenate([seconds for _, seconds in parts]) if parts else np.zeros((0, 4, 4))
    return bound_from_seconds(constant_R, seconds_EAR, forward_load_s, num_slots)


def _layer_seconds(profile: Profile, spec: ModelSpec, layer: int, counts: Sequence[int]) -> tuple[Floats, Floats]:
    """((E,) load seconds, (E, A, R) seconds) of the experts with tokens.

    Assignments (forward, backward): CPU both, CPU then accelerator, accelerator then CPU, accelerator both.
    """
    expert = spec.layers[layer]
    if expert is None:
        raise ValueError(f"counts_LE: got layer {layer}, which has no routed experts; wanted some of {spec.moe_layers}")
    times = expert_times(profile, expert)
    tokens_E = np.array([count for count in counts if count], dtype=np.float64)
    value_bytes = BYTES_PER_VALUE[profile.dtype]
    h2d_s_per_byte = min(profile.h2d_s_per_byte, profile.h2d_duplex_s_per_byte)
    d2h_s_per_byte = min(profile.d2h_s_per_byte, profile.d2h_duplex_s_per_byte)
    load_s = expert.numel * value_bytes * h2d_s_per_byte
    unload_s = expert.numel * value_bytes * d2h_s_per_byte
    up_E = tokens_E * expert.hidden_size * value_bytes * h2d_s_per_byte
    down_E = tokens_E * expert.hidden_size * value_bytes * d2h_s_per_byte
    zero_E = np.zeros_like(tokens_E)
    full_E = np.ones_like(tokens_E)
    forward_cpu = np.stack([evaluate(times.cpu_forward, tokens_E), up_E, down_E, zero_E], axis=-1)
    backward_cpu = np.stack([evaluate(times.cpu_backward, tokens_E), up_E, 2 * down_E, zero_E], axis=-1)
    forward_accelerator = np.stack(
        [zero_E, full_E * load_s, zero_E, evaluate(times.accelerator_forward, tokens_E)], axis=-1
    )
    backward_accelerator = np.stack(
        [zero_E, full_E * load_s, full_E * unload_s, evaluate(times.accelerator_backward, tokens_E)], axis=-1
    )
    seconds_EAR = np.stack(
        [
            forward_cpu + backward_cpu,
            forward_cpu + backward_accelerator,
            forward_accelerator + backward_cpu,
            forward_accelerator + backward_accelerator,
        ],
        axis=1,
    )
    return full_E * load_s, seconds_EAR


def bound_from_seconds(constant_R: Floats, seconds_EAR: Floats, load_s_E: Floats, num_slots: int) -> StepBound:
    """The bound from the resources' seconds: ``constant_R`` whatever happens, (E, A, R) by expert and assignment.

    The last assignment is accelerator in both passes; up to ``num_slots`` experts save one load (``load_s_E``) there.
    """
    best_s, prices, most_even_R = -np.inf, np.full(4, 0.25), constant_R

    def look(prices_R: Floats) -> Floats:
        nonlocal best_s, prices, most_even_R
        loads_R = _cheapest_loads(prices_R, constant_R, seconds_EAR, load_s_E, num_slots)
        value = float(prices_R @ loads_R)
        if value > best_s:
            best_s, prices = value, prices_R
        if most_even_R is constant_R or loads_R.max() < most_even_R.max():
            most_even_R = loads_R
        return loads_R

    for corner_R in np.eye(4):
        look(corner_R)
    # Ellipsoid { x : (x - centre)ᵀ shape⁻¹ (x - centre) ≤ 1 } around the simplex of the first three prices.
    centre, shape = np.full(3, 0.25), np.eye(3) * 0.7
    for _ in range(MAX_CUTS):
        prices_R = np.append(centre, 1 - centre.sum())
        is_inside = bool((prices_R >= 0).all())
        if not is_inside:
            worst = int(prices_R.argmin())
            uphill = np.eye(3)[worst] if worst < 3 else -np.ones(3)
        else:
            loads_R = look(prices_R)
            uphill = loads_R[:3] - loads_R[3]
        length = float(np.sqrt(uphill @ shape @ uphill))
        if is_inside and length <= TOLERANCE * best_s:
            break
        step = shape @ uphill / length
        centre = centre + step / 4
        shape = 9 / 8 * (shape - np.outer(step, step) / 2)
    cpu_s, h2d_s, d2h_s, accelerator_s = most_even_R.tolist()
    return StepBound(
        seconds=best_s,
        limiting=RESOURCES[int(prices.argmax())],
        cpu_s=cpu_s,
        h2d_s=h2d_s,
        d2h_s=d2h_s,
        accelerator_s=accelerator_s,
    )


def _cheapest_loads(
    prices_R: Floats, constant_R: Floats, seconds_EAR: Floats, load_s_E: Floats, num_slots: int
) -> Floats:
    """(R,) seconds of the assignment with the least price: per expert the cheapest, slots to those that save most."""
    cost_EA = seconds_EAR @ prices_R
    chosen_E = cost_EA.argmin(axis=1)
    experts = np.arange(len(chosen_E))
    kept_cost_E = cost_EA[:, -1] - prices_R[1] * load_s_E
    saving_E = cost_EA[experts, chosen_E] - kept_cost_E
    keepers = np.argsort(-saving_E, kind="stable")[:num_slots]
    keepers = keepers[saving_E[keepers] > 0]
    chosen_E[keepers] = 3
    loads_R = constant_R + seconds_EAR[experts, chosen_E].sum(axis=0)
    loads_R[1] -= load_s_E[keepers].sum()
    return loads_R
