"""A lower bound on a training step's seconds, whatever decides where experts run: the measure of every run.

A step is two passes, one after the other: backward starts from the loss of all micro-batches (the breadth-first order
of APTMoE, section 4). The optimizer and dense weights on their way up belong to the forward pass, since clipping by the
global norm lets no weight change before the last gradient is in; gradients on their way down belong to backward.

The relaxation of a pass: only four resources count (CPU, both link directions, accelerator), each works without a
pause, and every expert may be split between CPU and accelerator in any fraction. The least seconds T such that no
resource works longer than T is a linear program. By duality, any prices λ ≥ 0 with Σ λ = 1 give

    T ≥ min over assignments of Σ_r λ_r · (seconds of resource r),

where every expert takes its own cheapest assignment: a true bound even if λ is not optimal. The right side is concave
in λ; the ellipsoid method finds its maximum (three free prices, linear convergence). The resources' seconds are those
of "The bound" in APTMoE's facts, from measured curves instead of peak rates.

Legend: ``L`` MoE layers, ``E`` experts, ``A`` = 2 assignments of one expert (CPU, accelerator), ``R`` = 4 resources.
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
class PassBound:
    """``seconds``: no pass is faster. ``limiting``: the resource (one of ``RESOURCES``) with the highest price.

    The four sums are the resources' seconds in the most balanced assignment that the search met.
    """

    seconds: float
    limiting: str
    cpu_s: float
    h2d_s: float
    d2h_s: float
    accelerator_s: float


@dataclass(frozen=True, kw_only=True)
class StepBound:
    """No step is faster than its two passes, one after the other."""

    forward: PassBound
    backward: PassBound

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds


def step_bound(
    profile: Profile,
    spec: ModelSpec,
    counts_LE: Mapping[int, Sequence[int]],
    *,
    num_tokens: int,
    num_slots: int,
    num_optimizer_parameters: int,
    dense_h2d_bytes: int = 0,
    dense_backward_h2d_bytes: int = 0,
    dense_d2h_bytes: int = 0,
) -> StepBound:
    """The bound for a step in which layer ``l``'s experts got ``counts_LE[l]`` tokens (in forward, and again in
    backward).

    ``num_tokens``: tokens of the step, all micro-batches. ``num_slots``: experts whose weights may stay on the
    accelerator from forward to backward; none stay across the optimizer, which changes them. ``dense_*_bytes``: dense
    weights brought up after the optimizer and once more for backward (those that did not stay), dense gradients brought
    down. An accelerator without its own memory (rates of 0) shares nothing with the CPU here, so the bound stays true.
    Raises ``ValueError`` for a layer without experts or a shape not in the profile.
    """
    h2d_s_per_byte, d2h_s_per_byte = _link_rates(profile)
    num_layer_tokens = num_tokens * spec.num_held_layers

    def bound(constant: list[float], *, is_backward: bool) -> PassBound:
        parts = [
            _layer_seconds(profile, spec, layer, counts, is_backward=is_backward)
            for layer, counts in sorted(counts_LE.items())
        ]
        load_s = np.concatenate([load_s for load_s, _ in parts]) if parts else np.zeros(0)
        seconds_EAR = np.concatenate([seconds for _, seconds in parts]) if parts else np.zeros((0, 2, 4))
        return bound_from_seconds(np.array(constant), seconds_EAR, load_s, num_slots if is_backward else 0)

    optimizer_s = num_optimizer_parameters * profile.optimizer_s_per_parameter
    up_s, up_again_s = dense_h2d_bytes * h2d_s_per_byte, dense_backward_h2d_bytes * h2d_s_per_byte
    forward_s = num_layer_tokens * profile.dense_forward_s_per_token
    backward_s = num_layer_tokens * profile.dense_backward_s_per_token
    return StepBound(
        forward=bound([optimizer_s, up_s, 0.0, forward_s], is_backward=False),
        backward=bound([0.0, up_again_s, dense_d2h_bytes * d2h_s_per_byte, backward_s], is_backward=True),
    )


def _link_rates(profile: Profile) -> tuple[float, float]:
    """(h2d, d2h) seconds per byte at the best."""
    return (
        min(profile.h2d_s_per_byte, profile.h2d_duplex_s_per_byte),
        min(profile.d2h_s_per_byte, profile.d2h_duplex_s_per_byte),
    )


def _layer_seconds(
    profile: Profile, spec: ModelSpec, layer: int, counts: Sequence[int], *, is_backward: bool
) -> tuple[Floats, Floats]:
    """((E,) load seconds, (E, A, R) seconds) of the experts with tokens in one pass."""
    expert = spec.layers[layer]
    if expert is None:
        raise ValueError(f"counts_LE: got layer {layer}, which has no routed experts; wanted some of {spec.moe_layers}")
    times = expert_times(profile, expert)
    cpu, accelerator = (
        (times.cpu_backward, times.accelerator_backward)
        if is_backward
        else (times.cpu_forward, times.accelerator_forward)
    )
    tokens_E = np.array([count for count in counts if count], dtype=np.float64)
    value_bytes = BYTES_PER_VALUE[profile.dtype]
    h2d_s_per_byte, d2h_s_per_byte = _link_rates(profile)
    rows_bytes_E = tokens_E * expert.hidden_size * value_bytes
    zero_E = np.zeros_like(tokens_E)
    load_s_E = np.full_like(tokens_E, expert.numel * value_bytes * h2d_s_per_byte)
    unload_s_E = np.full_like(tokens_E, expert.numel * value_bytes * d2h_s_per_byte) if is_backward else zero_E
    down_s_E = rows_bytes_E * d2h_s_per_byte * (2 if is_backward else 1)
    on_cpu = np.stack([evaluate(cpu, tokens_E), rows_bytes_E * h2d_s_per_byte, down_s_E, zero_E], axis=-1)
    on_accelerator = np.stack([zero_E, load_s_E, unload_s_E, evaluate(accelerator, tokens_E)], axis=-1)
    return load_s_E, np.stack([on_cpu, on_accelerator], axis=1)


def bound_from_seconds(constant_R: Floats, seconds_EAR: Floats, load_s_E: Floats, num_kept: int) -> PassBound:
    """The bound from the resources' seconds: ``constant_R`` whatever happens, (E, A, R) by expert and assignment.

    The last assignment is the accelerator; up to ``num_kept`` experts save their load (``load_s_E``) there.
    """
    best_s, prices, most_even_R = -np.inf, np.full(4, 0.25), constant_R

    def look(prices_R: Floats) -> Floats:
        nonlocal best_s, prices, most_even_R
        loads_R = _cheapest_loads(prices_R, constant_R, seconds_EAR, load_s_E, num_kept)
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
    return PassBound(
        seconds=best_s,
        limiting=RESOURCES[int(prices.argmax())],
        cpu_s=cpu_s,
        h2d_s=h2d_s,
        d2h_s=d2h_s,
        accelerator_s=accelerator_s,
    )


def _cheapest_loads(
    prices_R: Floats, constant_R: Floats, seconds_EAR: Floats, load_s_E: Floats, num_kept: int
) -> Floats:
    """(R,) seconds of the least price: per expert the cheapest assignment, weights kept where that saves most."""
    cost_EA = seconds_EAR @ prices_R
    chosen_E = cost_EA.argmin(axis=1)
    experts = np.arange(len(chosen_E))
    kept_cost_E = cost_EA[:, -1] - prices_R[1] * load_s_E
    saving_E = cost_EA[experts, chosen_E] - kept_cost_E
    keepers = np.argsort(-saving_E, kind="stable")[:num_kept]
    keepers = keepers[saving_E[keepers] > 0]
    chosen_E[keepers] = seconds_EAR.shape[1] - 1
    loads_R = constant_R + seconds_EAR[experts, chosen_E].sum(axis=0)
    loads_R[1] -= load_s_E[keepers].sum()
    return loads_R
