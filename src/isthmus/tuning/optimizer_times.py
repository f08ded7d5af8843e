"""What optimizer steps take on the CPU, by themselves and beside what the accelerator's core computes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from isthmus.planning.memory import host_bytes
from isthmus.profiling.crowding import busy
from isthmus.profiling.timing import in_thread
from isthmus.spec.model import UnitKey, UnitLayout
from isthmus.spec.profile import Slowdown
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore
from isthmus.tuning.step_optimizer import EXPERTS_AT_ONCE

NUM_RUNS = 3
OPTIMIZER_BYTES = 256 << 20
"""Of weights, gradients and moments, at least."""


def optimizer_s_per_parameter(layout: UnitLayout, cold_bytes: int = OPTIMIZER_BYTES) -> tuple[float, float]:
    """Seconds per parameter of AdamW, and of a gradient's norm, on a unit like this one, from the calling thread, with
    memory as cold as in a step: the median of three runs over ``cold_bytes``, after one, which meets new memory."""
    num_units = max(2, cold_bytes // sum(host_bytes([layout]).values()) + 1)
    keys = [UnitKey(0, number) for number in range(num_units)]
    store = ParameterStore(dict.fromkeys(keys, layout), lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    # With gradients that are clipped, as most are.
    optimizer = StoreOptimizer(store, learning_rate=1e-6, clip_norm=1.0)
    for key in keys:
        store.gradient(key).fill_(1.0)
    seconds, norms = [], []
    for step in range(1, NUM_RUNS + 2):
        start_s = time.perf_counter()
        for key in keys:
            optimizer.gradient_destination(key)
            optimizer.finish_gradient(key)
        norms.append(time.perf_counter() - start_s)
        optimizer.begin_step(step, 1e-6)
        start_s = time.perf_counter()
        for first in range(0, len(keys), EXPERTS_AT_ONCE):
            optimizer.step_units(keys[first : first + EXPERTS_AT_ONCE])
        seconds.append(time.perf_counter() - start_s)
        optimizer.end_step()
    optimizer.close()
    numel = layout.numel * num_units
    return statistics.median(seconds[1:]) / numel, statistics.median(norms[1:]) / numel


def measure_optimizer_slowdown(
    layout: UnitLayout, other: Callable[[], object], *, num_threads: int, cold_bytes: int = OPTIMIZER_BYTES
) -> Slowdown:
    """Of steps on ``num_threads`` beside ``other`` on as many as the calling thread's: it takes memory's bandwidth, and
    the interpreter's lock, which an optimizer's many short operators wait for. Never below 1."""
    measure = partial(optimizer_s_per_parameter, layout, cold_bytes)
    alone_s, _ = in_thread(measure, num_threads=num_threads)
    with busy(other, num_threads=torch.get_num_threads()):
        beside_s, _ = in_thread(measure, num_threads=num_threads)
    return Slowdown(beside=max(1.0, beside_s / alone_s))
