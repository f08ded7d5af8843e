"""Measures this machine with this model's blocks: the profile that a plan starts from."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version

import psutil
import torch

from isthmus.models.moe_model import MoeModel
from isthmus.profiling.cache import cached_profile
from isthmus.profiling.dense import measure_dense
from isthmus.profiling.experts import measure_expert
from isthmus.profiling.links import measure_link
from isthmus.profiling.timing import in_thread
from isthmus.reporting.environment import cpu_name
from isthmus.spec.hardware import Hardware, LinkRate
from isthmus.spec.model import UnitKey, UnitLayout
from isthmus.spec.profile import Curve, ExpertTimes, Profile
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.data.batches import MicroBatch
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore


def slower(curve: Curve, factor: float) -> Curve:
    return Curve(num_tokens=curve.num_tokens, seconds=tuple(second * factor for second in curve.seconds))


def optimizer_seconds_per_parameter(layout: UnitLayout) -> float:
    """Seconds of AdamW per parameter on a unit like this one, from the calling thread, with memory as cold as in a step."""
    num_units = max(2, (64 << 20) // (layout.numel * 4) + 1)
    keys = [UnitKey(0, number) for number in range(num_units)]
    store = ParameterStore(dict.fromkeys(keys, layout), lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    optimizer = StoreOptimizer(store, learning_rate=1e-6)
    seconds = []
    for step in range(1, 4):
        for key in keys:
            optimizer.gradient_destination(key)
            optimizer.finish_gradient(key)
        optimizer.begin_step(step, 1e-6)
        start_s = time.perf_counter()
        optimizer.step_units(keys)
        seconds.append(time.perf_counter() - start_s)
        optimizer.end_step()
    optimizer.close()
    return min(seconds) / (layout.numel * num_units)


def measure_profile(
    model: MoeModel,
    accelerator: Accelerator,
    example: MicroBatch,
    *,
    max_tokens: int,
    num_cpu_threads: int,
    cpu_speed: float,
    refresh: bool = False,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> Profile:
    """The profile for ``model`` (dense units bound) on this machine, from the cache if it was measured before.

    ``max_tokens``: the most tokens one expert may get in a step. Blocks for seconds when measuring. Replaces the model's
    experts function and adds to its gradients.
    """
    hardware = Hardware(
        cpu_name=cpu_name(),
        num_cpu_threads=num_cpu_threads,
        host_memory_bytes=psutil.virtual_memory().total,
        accelerator=accelerator.name,
        accelerator_name=torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.name,
        accelerator_memory_bytes=0,
        cpu_speed=cpu_speed,
    )
    rates = [getattr(accelerator, name, 0.0) for name in ("h2d_bytes_per_s", "d2h_bytes_per_s", "latency_s")]
    identity = {
        "hardware": [hardware.cpu_name, num_cpu_threads, hardware.accelerator, hardware.accelerator_name, cpu_speed, *rates],
        "threads": torch.get_num_threads(),
        "model": model.module.config.to_json_string(),
        "dtype": model.dtype,
        "tokens": [max_tokens, *example.inputs["input_ids"].shape],
        "versions": [version("torch"), version("transformers"), version("isthmus")],
    }
    return cached_profile(
        identity,
        lambda: _measure(model, accelerator, example, max_tokens, num_cpu_threads, cpu_speed, hardware, progress),
        refresh=refresh,
    )


def _measure(
    model: MoeModel,
    accelerator: Accelerator,
    example: MicroBatch,
    max_tokens: int,
    num_cpu_threads: int,
    cpu_speed: float,
    hardware: Hardware,
    progress: Callable[[str, float], None],
) -> Profile:
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    shapes = {}
    for layer in model.spec.moe_layers:
        spec = model.moe_parts[layer].spec
        shapes[Profile.expert_key(spec.hidden_size, spec.intermediate_size, spec.has_gate)] = layer
    experts: dict[str, ExpertTimes] = {}
    optimizer_s = 0.0
    for number, (key, layer) in enumerate(shapes.items()):
        progress("measuring experts", number / len(shapes))
        spec, module = model.moe_parts[layer].spec, model.experts[layer]

        def on(device: torch.device, synchronize: Callable[[], None], spec=spec, module=module) -> tuple[Curve, Curve]:
            return measure_expert(
                spec, dtype, device=device, max_tokens=max_tokens, synchronize=synchronize, activation_module=module
            )

        here = on(accelerator.device, accelerator.synchronize)
        cpu = here
        if accelerator.is_separate:
            cpu = in_thread(lambda on=on: on(torch.device("cpu"), lambda: None), num_threads=num_cpu_threads)
        experts[key] = ExpertTimes(
            cpu_forward=slower(cpu[0], 1 / cpu_speed),
            cpu_backward=slower(cpu[1], 1 / cpu_speed),
            accelerator_forward=here[0],
            accelerator_backward=here[1],
        )
        layout = model.layouts[UnitKey(layer, 0)]
        measured = in_thread(lambda layout=layout: optimizer_seconds_per_parameter(layout), num_threads=num_cpu_threads)
        optimizer_s = max(optimizer_s, measured / cpu_speed)
    progress("measuring the dense part", 0.5)
    forward_s, backward_s = measure_dense(
        model, example.inputs, num_tokens=example.num_tokens, synchronize=accelerator.synchronize
    )
    zero = {"h2d_s_per_byte": 0.0, "d2h_s_per_byte": 0.0, "h2d_duplex_s_per_byte": 0.0, "d2h_duplex_s_per_byte": 0.0}
    link, latency_s, window = zero, 0.0, 1
    if accelerator.is_separate:
        progress("measuring the link", 0.8)
        first = model.moe_parts[model.spec.moe_layers[0]].spec
        times = measure_link(accelerator, min(first.numel * dtype.itemsize, 64 << 20))
        link = {name: getattr(times, name) for name in zero}
        latency_s, window = times.latency_s, times.window
        rate = LinkRate(
            h2d_bytes_per_s=1 / times.h2d_s_per_byte, d2h_bytes_per_s=1 / times.d2h_s_per_byte, latency_s=latency_s
        )
        hardware = Hardware(**{**vars(hardware), "link": rate})
    return Profile(
        hardware=hardware,
        dtype=model.dtype,
        experts=experts,
        **link,
        copy_latency_s=latency_s,
        copy_window=window,
        optimizer_s_per_parameter=optimizer_s,
        dense_forward_s_per_token=forward_s,
        dense_backward_s_per_token=backward_s,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
