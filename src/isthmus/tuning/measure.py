"""Measures this machine with this model's blocks: the profile that a plan starts from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import psutil
import torch

from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.planning.curves import scale
from isthmus.planning.memory import host_bytes
from isthmus.profiling.cache import cached_profile, keep
from isthmus.profiling.crowding import Forgetting, Interruption, measure_slowdown
from isthmus.profiling.dense import Forward, loss_of, measure_dense, measure_outer, no_experts
from isthmus.profiling.experts import COLD_BYTES, LayersExperts, measure_expert, one_expert
from isthmus.profiling.limits import cpu_quota, free_memory_bytes, last_level_cache_bytes
from isthmus.profiling.links import LinkTimes, measure_link
from isthmus.profiling.timing import in_thread, median_s
from isthmus.reporting.environment import cpu_name, num_cpus_usable
from isthmus.spec.hardware import Hardware, LinkRate
from isthmus.spec.model import UnitKey
from isthmus.spec.profile import ExpertTimes, Profile, Slowdown
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.data.batches import MicroBatch
from isthmus.tuning.optimizer_times import OPTIMIZER_BYTES, measure_optimizer_slowdown, optimizer_s_per_parameter
from isthmus.tuning.taped import TapedForward
from isthmus.tuning.wave_times import measure_routing

COPIED_BYTES = 64 << 20
VERSIONS = tuple(version(name) for name in ("torch", "transformers", "isthmus"))
"""With others things may take as long as never before."""
IN_STEP = 4
"""Counts what is measured for predictions of steps: profiles that have less are measured again."""


class OneOfSeveral(NamedTuple):
    """A process of a pipeline, whose dense part runs the whole model's code with nothing in the others' places."""

    num_processes: int
    num_stages: int | None
    dense_s_per_token: Callable[[], tuple[float, float]]
    """Measures (forward, backward) of one of its layers, without what lies outside every layer, as they usually are in
    a step."""


def at_cpu_speed(profile: Profile, speed: float) -> Profile:
    """The profile of a machine whose CPU computes experts at ``speed`` times the measured rate."""
    if speed == 1.0:
        return profile
    experts = {
        key: replace(
            times, cpu_forward=scale(times.cpu_forward, 1 / speed), cpu_backward=scale(times.cpu_backward, 1 / speed)
        )
        for key, times in profile.experts.items()
    }
    return replace(profile, hardware=replace(profile.hardware, cpu_speed=speed), experts=experts)


def memmove_s_per_byte() -> float:
    """Of a thread that copies memory which no cache holds."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    destination = torch.ones_like(source)
    return median_s(lambda: ctypes.memmove(destination.data_ptr(), source.data_ptr(), COPIED_BYTES)) / COPIED_BYTES


def measure_profile(
    model: MoeModel,
    accelerator: Accelerator,
    example: MicroBatch,
    *,
    max_tokens: int,
    num_cpu_threads: int,
    refresh: bool = False,
    in_step: bool = False,
    one_of: OneOfSeveral | None = None,
    run: Forward = loss_of,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> Profile:
    """The profile for what ``model`` holds (dense units bound) on this machine, from the cache if it was measured
    before. ``run`` runs that.

    ``max_tokens``: the most tokens one expert may get in a step. Blocks for seconds when measuring. Replaces the
    model's experts function and adds to its gradients. ``in_step``: also what a prediction of a step needs, and takes
    seconds more to measure: routing, norms, and what slows things down in a step; ``one_of``: of one of several
    processes.
    """
    hardware = Hardware(
        cpu_name=cpu_name(),
        num_cpu_threads=num_cpu_threads,
        host_memory_bytes=psutil.virtual_memory().total,
        accelerator=accelerator.name,
        accelerator_name=torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.name,
        accelerator_memory_bytes=0,
    )
    identity = _identity(model, accelerator, example, hardware, max_tokens)

    def measure() -> Profile:
        work = Work(
            model=model,
            accelerator=accelerator,
            example=example,
            max_tokens=max_tokens,
            num_cpu_threads=num_cpu_threads,
            run=run,
            in_turns=one_of is not None,
            in_step=in_step,
        )
        found = _measure(work, hardware, progress)
        if one_of is None:
            return found
        progress("measuring the dense part of one of several", 1.0)
        return _in_pipeline(found, model, one_of)

    if not in_step:
        return cached_profile(identity, measure, refresh=refresh)
    of_step = {"in_step": IN_STEP, "one of": one_of and list(one_of[:2])}
    found = cached_profile(identity | of_step, measure, refresh=refresh)
    if one_of is None:
        keep(identity, found)
    return found


def _identity(
    model: MoeModel, accelerator: Accelerator, example: MicroBatch, hardware: Hardware, max_tokens: int
) -> dict[str, object]:
    """Whatever a profile depends on."""
    rates = [getattr(accelerator, name, 0.0) for name in ("h2d_bytes_per_s", "d2h_bytes_per_s", "latency_s")]
    identity: dict[str, object] = {
        "hardware": [
            hardware.cpu_name,
            hardware.num_cpu_threads,
            hardware.accelerator,
            hardware.accelerator_name,
            *rates,
        ],
        "threads": torch.get_num_threads(),
        "model": model.module.config.to_json_string(),
        "dtype": model.dtype,
        "tokens": [max_tokens, *example.inputs["input_ids"].shape],
        "versions": VERSIONS,
    }
    if (quota := cpu_quota()) is not None:
        identity["quota"] = quota
    if len(model.held_layouts) < len(model.layouts):
        identity["layers"] = sorted({key.layer for key in model.held_layouts})
    return identity


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured of. ``in_turns``: micro-batches go through a layer one after the other, each with its experts,
    as in a pipeline; else all together."""

    model: MoeModel
    accelerator: Accelerator
    example: MicroBatch
    max_tokens: int
    num_cpu_threads: int
    run: Forward
    in_turns: bool
    in_step: bool
    """Whether a step is to be predicted, not only what is best in it."""

    @property
    def usual_tokens(self) -> int:
        """Of a wave."""
        return self.example.num_tokens if self.in_turns else self.max_tokens

    def cold_bytes(self, share: float, least: int) -> int:
        """Of memory that a step goes through, a ``share`` of all that is held, before it comes back to the same place;
        as much as no cache holds is enough, and an eighth of what is free. Where micro-batches go through a stage in
        turns, they come back soon."""
        if self.in_turns or not self.in_step:
            return least
        held = sum(host_bytes(self.model.layouts.values()).values())
        return max(least, min(int(share * held), 2 * last_level_cache_bytes(), free_memory_bytes() // 8))

    @property
    def has_core_for_worker(self) -> bool:
        """Whether computing thread and CPU worker compute at once, not in turns."""
        return num_cpus_usable() >= torch.get_num_threads() + self.num_cpu_threads


def interruption(model: MoeModel, accelerator: Accelerator, example: MicroBatch) -> Interruption | None:
    """What comes between two dense parts of a step where a CPU computes and there are experts; else None."""
    if accelerator.device.type != "cpu" or not model.spec.moe_layers:
        return None
    layer = model.spec.moe_layers[0]
    return LayersExperts(
        model.moe_parts[layer].spec,
        torch_dtype(model.dtype),
        num_tokens=example.num_tokens,
        saves=not accelerator.is_separate,
        activation_module=model.experts[layer],
    )


def _in_pipeline(profile: Profile, model: MoeModel, one_of: OneOfSeveral) -> Profile:
    """Experts come between any two dense parts, and caches are always cold. What is measured so is not slowed down once
    more."""
    forward_s, backward_s = one_of.dense_s_per_token()
    num_layers, slowdown = model.spec.num_layers, profile.dense_slowdown
    return replace(
        profile,
        dense_slowdown=Slowdown(alone=1.0, beside=slowdown.beside / slowdown.alone),
        dense_forward_s_per_token=forward_s + profile.outer_forward_s_per_token / num_layers,
        dense_backward_s_per_token=backward_s + profile.outer_backward_s_per_token / num_layers,
    )


def _measure(work: Work, hardware: Hardware, progress: Callable[[str, float], None]) -> Profile:
    model, accelerator, example, run = work.model, work.accelerator, work.example, work.run
    progress("measuring the link", 0.0)
    times, hardware = _measure_link(model, accelerator, hardware)
    progress("measuring the dense part", 0.1)
    # What runs parts of a model in a pipeline is not taped.
    run = TapedForward() if run is loss_of else run
    forward_s, backward_s = measure_dense(
        model, example.inputs, num_tokens=example.num_tokens, synchronize=accelerator.synchronize, run=run
    )
    outer_s, slowdowns = (0.0, 0.0), (Slowdown(), Slowdown(), Slowdown())
    if work.in_step:
        progress("measuring what slows it down", 0.15)
        outer_s = measure_outer(
            model, example.inputs, num_tokens=example.num_tokens, synchronize=accelerator.synchronize
        )
        slowdowns = _measure_slowdowns(work, run)
    experts, optimizer_s, norm_s = _measure_experts(work, progress)
    optimizer_slowdown = _optimizer_slowdown(work, run) if work.in_step else Slowdown()
    return Profile(
        hardware=hardware,
        dtype=model.dtype,
        experts=experts,
        h2d_s_per_byte=times.h2d_s_per_byte,
        d2h_s_per_byte=times.d2h_s_per_byte,
        h2d_duplex_s_per_byte=times.h2d_duplex_s_per_byte,
        d2h_duplex_s_per_byte=times.d2h_duplex_s_per_byte,
        copy_latency_s=times.latency_s,
        copy_window=times.window,
        optimizer_s_per_parameter=optimizer_s,
        dense_forward_s_per_token=forward_s,
        dense_backward_s_per_token=backward_s,
        outer_forward_s_per_token=outer_s[0],
        outer_backward_s_per_token=outer_s[1],
        norm_s_per_parameter=norm_s,
        dense_slowdown=slowdowns[0],
        accelerator_slowdown=slowdowns[1],
        cpu_slowdown=slowdowns[2],
        optimizer_slowdown=optimizer_slowdown,
        copy_core_s_per_byte=memmove_s_per_byte() if accelerator.name == "emulated" else 0.0,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _measure_link(model: MoeModel, accelerator: Accelerator, hardware: Hardware) -> tuple[LinkTimes, Hardware]:
    """(what copies take, the hardware with its link); both as they are without a separate memory."""
    if not accelerator.is_separate:
        return LinkTimes.free(), hardware
    first = next(iter(model.moe_parts.values())).spec
    item_bytes = 2 if model.dtype == "bf16" else 4
    times = measure_link(accelerator, min(first.numel * item_bytes, 64 << 20))
    rate = LinkRate(
        h2d_bytes_per_s=1 / times.h2d_s_per_byte, d2h_bytes_per_s=1 / times.d2h_s_per_byte, latency_s=times.latency_s
    )
    return times, replace(hardware, link=rate)


def _measure_slowdowns(work: Work, run: Forward) -> tuple[Slowdown, Slowdown, Slowdown]:
    """(of the dense part, of experts on the accelerator, of those on the CPU), where a CPU computes all of them; else
    none. What a turn of the other takes, where the two have not a core each, is no slowdown."""
    model, accelerator, num_cpu_threads = work.model, work.accelerator, work.num_cpu_threads
    if accelerator.device.type != "cpu" or not model.spec.moe_layers:
        return Slowdown(), Slowdown(), Slowdown()
    layer = model.spec.moe_layers[0]
    spec = model.moe_parts[layer].spec
    forward, backward = one_expert(
        spec,
        torch_dtype(model.dtype),
        num_tokens=max(1, work.usual_tokens * spec.top_k // spec.num_experts),
        saves=not accelerator.is_separate,
        activation_module=model.experts[layer],
    )
    model.set_experts_function(no_experts)

    def expert() -> None:
        forward()
        backward()

    def dense() -> None:
        run(model, work.example.inputs).backward()

    other = expert if accelerator.is_separate else None
    measured = partial(measure_slowdown, takes_turns=not work.has_core_for_worker)
    of_dense = measured(dense, other, num_threads=num_cpu_threads)
    here = measured(expert, other, num_threads=num_cpu_threads)
    if not accelerator.is_separate:
        return of_dense, here, here
    num_threads = torch.get_num_threads()
    there = in_thread(lambda: measured(expert, dense, num_threads=num_threads), num_threads=num_cpu_threads)
    return of_dense, here, there


def _optimizer_slowdown(work: Work, run: Forward) -> Slowdown:
    """Beside the next forward pass, where another core computes that; else none."""
    model, accelerator = work.model, work.accelerator
    is_beside = accelerator.is_separate and accelerator.device.type == "cpu" and work.has_core_for_worker
    if not is_beside or not model.spec.moe_layers:
        return Slowdown()
    layout = model.layouts[UnitKey(model.spec.moe_layers[0], 0)]
    model.set_experts_function(no_experts)
    return measure_optimizer_slowdown(
        layout,
        lambda: run(model, work.example.inputs),
        num_threads=work.num_cpu_threads,
        cold_bytes=work.cold_bytes(1, OPTIMIZER_BYTES),
    )


def _measure_experts(work: Work, progress: Callable[[str, float], None]) -> tuple[dict[str, ExpertTimes], float, float]:
    """(curves by shape of expert; seconds per parameter of the slowest shape: the optimizer's, a norm's)."""
    model, accelerator, max_tokens = work.model, work.accelerator, work.max_tokens
    num_cpu_threads, dtype = work.num_cpu_threads, torch_dtype(model.dtype)
    shapes = {}
    for layer in model.spec.moe_layers:
        spec = model.moe_parts[layer].spec
        shapes[Profile.expert_key(spec.hidden_size, spec.intermediate_size, spec.has_gate)] = layer
    experts: dict[str, ExpertTimes] = {}
    optimizer_s = norm_s = 0.0
    for number, (key, layer) in enumerate(shapes.items()):
        progress("measuring experts", 0.2 + 0.8 * number / len(shapes))
        on_device = partial(
            measure_expert,
            model.moe_parts[layer].spec,
            dtype,
            max_tokens=max_tokens,
            activation_module=model.experts[layer],
            saves=not accelerator.is_separate,
            accumulates=work.in_turns,  # all but the first
            cold_bytes=work.cold_bytes(1 / 4, COLD_BYTES),
        )
        here = on_device(device=accelerator.device, synchronize=accelerator.synchronize)
        cpu = here
        if accelerator.is_separate:
            cpu = in_thread(partial(on_device, device=torch.device("cpu")), num_threads=num_cpu_threads)
        routing = None, None
        if work.in_step:
            progress("measuring routing", 0.2 + 0.8 * (number + 0.8) / len(shapes))
            routing = measure_routing(
                model.moe_parts[layer].spec,
                model.experts[layer],
                dtype,
                device=accelerator.device,
                max_tokens=max_tokens,
                interrupt=interruption(model, accelerator, work.example) or Forgetting(),
                synchronize=accelerator.synchronize,
            )
        experts[key] = ExpertTimes(
            cpu_forward=cpu[0],
            cpu_backward=cpu[1],
            accelerator_forward=here[0],
            accelerator_backward=here[1],
            routing_forward=routing[0],
            routing_backward=routing[1],
        )
        progress("measuring the optimizer", 0.2 + 0.8 * (number + 0.9) / len(shapes))
        layout = model.layouts[UnitKey(layer, 0)]
        measure = partial(optimizer_s_per_parameter, layout, work.cold_bytes(1, OPTIMIZER_BYTES))
        step_s, one_norm_s = in_thread(measure, num_threads=num_cpu_threads)
        optimizer_s, norm_s = max(optimizer_s, step_s), max(norm_s, one_norm_s)
    return experts, optimizer_s, norm_s
