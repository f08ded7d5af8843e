"""A lower bound on a simulated step, whatever decides where experts run.

Of every device the linear program of ``planning/bound.py``: forward, then backward (the flush parts them), experts
divided in any fraction, no resource ever pausing, every micro-batch computing its experts by itself, as many weights
left on the accelerator by forward as its memory holds. The optimizer works in backward or in the next step's forward,
in the shares that make both together shortest. No step is faster than its busiest device. With the pipeline's bubble
factor, as APTMoE's facts have it, the bound is that of steps whose devices begin and end one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from isthmus.planning.bound import bound_from_seconds
from isthmus.simulation.tuning.work import StepWork

GOLDEN = (5**0.5 - 1) / 2
NUM_SECTIONS = 12
"""After which the optimizer's share is known to 1/500."""

TOLERANCE = 1e-3
"""By which a device may be busier than the one that was taken for the busiest."""


def bubble_factor(num_micro_batches: int, num_stages: int, num_devices: int) -> float:
    """(M·R + D - 1) ÷ (M·R): micro-batches, rounds over the devices, devices."""
    slots = num_micro_batches * (num_stages / num_devices)
    return (slots + num_devices - 1) / slots


def step_bound_s(work: StepWork) -> float:
    """Seconds, without the bubble factor."""
    devices = [_Device(work, device) for device in range(len(work.order))]
    best_s = 0.0
    # The most that a device's bound can be says whether it is worth the search.
    for device in sorted(devices, key=lambda device: -device.most_s):
        if device.most_s > best_s:
            best_s = max(best_s, _least(device.seconds, device.optimizer_s, best_s))
    return best_s


class _Device:
    """``seconds(optimizer_s)`` of both passes, with so much of the optimizer in forward and the rest in backward."""

    def __init__(self, work: StepWork, device: int) -> None:
        layers = [layer for run in work.runs[device] if not run.is_backward for layer in run.layers]
        largest = max(work.layer_costs(layer).expert_bytes for layer in layers)
        memory_bytes = work.costs.seats[device].host.accelerator.memory_bytes
        self._forward = _Pass(work, layers, is_backward=False, num_kept=0)
        self._backward = _Pass(work, layers, is_backward=True, num_kept=memory_bytes // largest if largest else 0)
        self.optimizer_s = sum(work.layer_costs(layer).optimizer_s for layer in layers)
        self.most_s = self.seconds(0.0)

    def seconds(self, optimizer_s: float) -> float:
        return self._forward.seconds(optimizer_s) + self._backward.seconds(self.optimizer_s - optimizer_s)


def _least(seconds: Callable[[float], float], most_s: float, enough_s: float) -> float:
    """A lower bound on the least value of ``seconds``, a convex function on 0 to ``most_s`` that rises or falls by no
    more than a second a second (golden section). 0 as soon as it is known to be hardly
    more than ``enough_s``."""
    low, high = 0.0, most_s
    near, far = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_near, at_far = seconds(near), seconds(far)
    for _ in range(NUM_SECTIONS):
        if min(at_near, at_far) <= enough_s * (1 + TOLERANCE):
            return 0.0
        if at_near <= at_far:
            high, far, at_far = far, near, at_near
            near = high - GOLDEN * (high - low)
            at_near = seconds(near)
        else:
            low, near, at_near = near, far, at_far
            far = low + GOLDEN * (high - low)
            at_far = seconds(far)
    return min(at_near, at_far) - (high - low)


class _Pass:
    """Seconds of (CPU, h2d, d2h, accelerator) by expert and side, and what has to be done in any case."""

    def __init__(self, work: StepWork, layers: list[int], *, is_backward: bool, num_kept: int) -> None:
        self._constant = np.zeros(4)
        self._num_kept = num_kept
        parts, loads = [np.zeros((0, 2, 4))], [np.zeros(0)]
        for layer in layers:
            costs = work.layer_costs(layer)
            # Of dense parts forward may leave all there.
            self._constant[1] += 0.0 if is_backward else costs.dense_load_s
            self._constant[2] += costs.dense_unload_s if is_backward else 0.0
            self._constant[3] += costs.num_parts * costs.dense_s[is_backward]
            if layer not in work.tables:
                continue
            tokens = np.array([count for count in work.counts[layer] if count])
            zero = np.zeros_like(tokens)
            load = np.full_like(tokens, costs.load_s)
            unload = np.full_like(tokens, costs.unload_s) if is_backward else zero
            down = tokens * costs.row_d2h_s * (2 if is_backward else 1)
            part = tokens / costs.num_parts
            cpu_s, accelerator_s = (
                costs.num_parts * of(part, is_backward=is_backward) for of in (costs.cpu_s, costs.accelerator_s)
            )
            on_cpu = [cpu_s, tokens * costs.row_h2d_s, down, zero]
            on_accelerator = [zero, load, unload, accelerator_s]
            parts.append(np.stack([np.stack(on_cpu, axis=-1), np.stack(on_accelerator, axis=-1)], axis=1))
            loads.append(load)
        self._seconds, self._load_s = np.concatenate(parts), np.concatenate(loads)

    def seconds(self, optimizer_s: float) -> float:
        """With so much of the optimizer in this pass."""
        constant = self._constant + np.array([optimizer_s, 0.0, 0.0, 0.0])
        return bound_from_seconds(constant, self._seconds, self._load_s, self._num_kept).seconds
