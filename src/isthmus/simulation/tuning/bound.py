"""A lower bound on a simulated step, whatever decides where experts run.

Of every device the linear program of ``planning/bound.py``: forward, then backward with the optimizer (the flush
parts them), experts divided in any fraction, no resource ever pausing, every micro-batch computing its experts by
itself. No step is faster than its busiest device. With the pipeline's bubble factor, as APTMoE's facts have it, the
bound is that of steps whose devices begin and end one after the other.
"""

from __future__ import annotations

import numpy as np

from isthmus.planning.bound import bound_from_seconds
from isthmus.simulation.tuning.work import StepWork


def bubble_factor(num_micro_batches: int, num_stages: int, num_devices: int) -> float:
    """(M·R + D - 1) ÷ (M·R): micro-batches, rounds over the devices, devices."""
    slots = num_micro_batches * (num_stages / num_devices)
    return (slots + num_devices - 1) / slots


def step_bound_s(work: StepWork) -> float:
    """Seconds, without the bubble factor."""
    return max(_device_s(work, device) for device in range(len(work.order)))


def _device_s(work: StepWork, device: int) -> float:
    runs = work.runs[device]
    layers = [layer for run in runs if not run.is_backward for layer in run.layers]
    backward = [run for run in runs if run.is_backward]
    # What forward leaves there: the last two stages' experts.
    num_kept = sum(
        len(work.tables[layer].counts) for run in backward[:2] for layer in run.layers if layer in work.tables
    )
    kept_dense = {layer for run in backward[:2] for layer in run.layers}
    return _pass_s(work, layers, False, 0, set()) + _pass_s(work, layers, True, num_kept, kept_dense)


def _pass_s(work: StepWork, layers: list[int], is_backward: bool, num_kept: int, kept_dense: set[int]) -> float:
    """Seconds of (CPU, h2d, d2h, accelerator) by expert and side, and what has to be done in any case."""
    constant = np.zeros(4)
    parts, loads = [], []
    for layer in layers:
        costs = work.layer_costs(layer)
        constant[1] += 0.0 if layer in kept_dense else costs.dense_load_s
        constant[3] += costs.num_parts * costs.dense_s[is_backward]
        if is_backward:
            constant[0] += costs.optimizer_s
            constant[2] += costs.dense_unload_s
        if layer not in work.tables:
            continue
        tokens = np.array([count for count in work.tables[layer].counts if count])
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
    seconds = np.concatenate(parts) if parts else np.zeros((0, 2, 4))
    load_s = np.concatenate(loads) if loads else np.zeros(0)
    return bound_from_seconds(constant, seconds, load_s, num_kept).seconds
