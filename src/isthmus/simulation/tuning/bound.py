"""Lower bounds on a simulated step, whatever decides where experts run.

Of every device the linear program of ``planning/bound.py``: forward, then backward (the flush parts them), experts
divided in any fraction, no resource ever pausing, every micro-batch computing its experts by itself, as many weights
left on the accelerator by forward as its memory holds. No step is faster than its busiest device.

``step_bound_s``: the optimizer works in backward or in the next step's forward, in the shares that make both together
shortest. With the pipeline's bubble factor, as APTMoE's facts have it, the bound is that of steps whose devices begin
and end one after the other.

``norm_bound_s``: of steps that are clipped by the norm of all gradients, as our runtime's are, and begin when it is
known. Take one device, and let x be when it has computed its last forward. Its layers' gradients come after x, so their
steps come after the norm, which begins the next step; and no layer's forward comes before its step. So between the
step's beginning and x its cores do the whole optimizer and forward's experts, and its link loads all that forward
computes on the accelerator, since weights loaded before their step are the old ones. All of backward comes after x:
nothing of it can be done in forward, but for loads, which may come as early as memory holds them (they count as left
there by forward), and nothing of it can be left to the next forward, gradients neither: they are added up in the
host's memory, where the norm is taken. So x and the rest of the step are each at least their pass's program.

With ``fills``, what the pipeline keeps a device waiting for belongs to it too, and needs no factor. Before its first
micro-batch arrives, that has passed all stages before its first; its cores may step, its link load meanwhile. After x
its last micro-batch has to pass all stages after its last, and a gradient, once all are through, to come back as far.
A micro-batch passes a layer no faster than its dense part and then its experts, on all cores and the accelerator
at once; in backward gradients of weights may wait (as in ``tuning/backward_pass.py``), what forward computed is
computed once more when the gradient is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from isthmus.planning.bound import bound_from_seconds
from isthmus.simulation.tuning.costs import ACCELERATOR_BACKWARD, CPU_BACKWARD, Floats
from isthmus.simulation.tuning.work import StepWork

GOLDEN = (5**0.5 - 1) / 2
NUM_SECTIONS = 12
"""After which the optimizer's share is known to 1/500."""

TOLERANCE = 1e-3
"""By which a device may be busier than the one that was taken for the busiest."""

ACCELERATOR_WEIGHTS, CPU_WEIGHTS = 1 / ACCELERATOR_BACKWARD, 1 / CPU_BACKWARD
"""Gradients of weights, of backward's seconds."""


def bubble_factor(num_micro_batches: int, num_stages: int, num_devices: int) -> float:
    """(M·R + D - 1) ÷ (M·R): micro-batches, rounds over the devices, devices."""
    slots = num_micro_batches * (num_stages / num_devices)
    return (slots + num_devices - 1) / slots


def step_bound_s(work: StepWork) -> float:
    """Seconds, without the bubble factor."""
    devices = [_Device(work, device) for device in range(len(work.order))]
    best_s = 0.0
    # The most that a device's bound can be says whether it is worth the search.
    for most_s, device in sorted([(device.seconds(0.0), device) for device in devices], key=lambda found: -found[0]):
        if most_s > best_s:
            best_s = max(best_s, _least(device.seconds, device.optimizer_s, best_s))
    return best_s


def norm_bound_s(work: StepWork, *, fills: bool = False) -> float:
    """Seconds of steps that wait for the norm of all gradients; with ``fills`` the pipeline is filled and drained."""
    passes = [_passing_s(work, is_backward=is_backward) for is_backward in (False, True)] if fills else None
    return max(_Device(work, device).clipped_s(passes) for device in range(len(work.order)))


class _Device:
    """``seconds(optimizer_s)`` of both passes, with so much of the optimizer in forward and the rest in backward."""

    def __init__(self, work: StepWork, device: int) -> None:
        layers = [layer for run in work.runs[device] if not run.is_backward for layer in run.layers]
        largest = max(work.layer_costs(layer).expert_bytes for layer in layers)
        memory_bytes = work.costs.seats[device].host.accelerator.memory_bytes
        self._forward = _Pass(work, layers, is_backward=False, num_kept=0)
        self._backward = _Pass(work, layers, is_backward=True, num_kept=memory_bytes // largest if largest else 0)
        self.optimizer_s = sum(work.layer_costs(layer).optimizer_s for layer in layers)
        own = [number for number, other in enumerate(work.device_of) if other == device]
        self._first_stage, self._last_stage = own[0], own[-1]

    def seconds(self, optimizer_s: float) -> float:
        rest_s = self.optimizer_s - optimizer_s
        return self._forward.seconds(cpu_s=optimizer_s) + self._backward.seconds(cpu_s=rest_s)

    def clipped_s(self, passes: Sequence[Floats] | None) -> float:
        """With all of the optimizer in forward. ``passes``: (stages,) seconds of a micro-batch, forward and backward;
        None: the device never waits for others."""
        head_s = gap_s = 0.0
        if passes is not None:
            head_s = float(passes[0][: self._first_stage].sum())
            gap_s = float(sum(seconds[self._last_stage + 1 :].sum() for seconds in passes))
        forward_s = self._forward.seconds(cpu_s=max(self.optimizer_s, head_s), accelerator_s=head_s)
        return forward_s + self._backward.seconds(cpu_s=gap_s, accelerator_s=gap_s)


def _passing_s(work: StepWork, *, is_backward: bool) -> Floats:
    """(stages,) the least seconds in which one micro-batch passes a stage, in backward without gradients of weights."""
    on_accelerator, on_cpu = (1 - ACCELERATOR_WEIGHTS, 1 - CPU_WEIGHTS) if is_backward else (1.0, 1.0)
    found = []
    for stage in work.stages:
        seconds = 0.0
        for layer in range(stage.first_layer, stage.last_layer + 1):
            seconds += on_accelerator * work.layer_costs(layer).dense_s[is_backward]
            if layer in work.tables:
                tables = work.tables[layer]
                accelerator_s, cpu_s = (
                    np.array([of[is_backward][expert] for expert in tables.used])
                    for of in (tables.accelerator_s, tables.cpu_s)
                )
                seconds += evenest_s(on_accelerator * accelerator_s, on_cpu * cpu_s)
        found.append(seconds)
    return np.array(found)


def evenest_s(accelerator_s: Floats, cpu_s: Floats) -> float:
    """The least seconds for experts (E,) divided in any fraction between accelerator and CPU."""
    if not len(cpu_s):
        return 0.0
    order = np.argsort(accelerator_s / cpu_s, kind="stable")
    accelerator_s, cpu_s = accelerator_s[order], cpu_s[order]
    on_s, off_s = accelerator_s.cumsum(), cpu_s.sum() - cpu_s.cumsum()
    off_s[-1] = 0.0
    at = int((on_s >= off_s).argmax())
    # Of this expert a share, so that both end together.
    before_s, left_s = on_s[at] - accelerator_s[at], off_s[at] + cpu_s[at]
    share = (left_s - before_s) / (accelerator_s[at] + cpu_s[at])
    return float(before_s + share * accelerator_s[at])


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

    def seconds(self, *, cpu_s: float = 0.0, accelerator_s: float = 0.0) -> float:
        """With so much else on the cores and on the accelerator in this pass."""
        constant = self._constant + np.array([cpu_s, 0.0, 0.0, accelerator_s])
        return bound_from_seconds(constant, self._seconds, self._load_s, self._num_kept).seconds
