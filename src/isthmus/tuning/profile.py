"""``isthmus profile``: measures this machine with a model's blocks, without its weights, and shows what it found."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from isthmus.models.attention import use_blocked_attention
from isthmus.models.config import load_config, model_spec
from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.planning.curves import evaluate
from isthmus.planning.stages import divide
from isthmus.profiling.cache import cached_profile
from isthmus.profiling.dense import measure_dense
from isthmus.profiling.limits import cpu_quota
from isthmus.profiling.together import measure_together
from isthmus.reporting.environment import cpu_name, num_cpus_usable
from isthmus.reporting.human import human_bytes, human_s
from isthmus.reporting.progress import TrainingProgress
from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.model import ExpertSpec, ModelSpec
from isthmus.spec.profile import ExpertTimes, Profile
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.units import Emulation, parse_emulate
from isthmus.training.heap import keep_freed_memory
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.data import IGNORED, MicroBatch, keep_documents_apart
from isthmus.tuning.data.batches import largest_micro_batch
from isthmus.tuning.measure import IN_STEP, VERSIONS, OneOfSeveral, at_cpu_speed, interruption, measure_profile
from isthmus.tuning.pipeline.company import own_cores
from isthmus.tuning.pipeline.pipeline import Pipeline
from isthmus.tuning.session import SessionOptions, accelerator_of, thread_split

FEW_LAYERS = 8
"""Models of more are measured with fewer, if those have all kinds of layers that there are."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a step, as far as what its parts take depends on them."""

    dtype: str
    seq_len: int
    micro_batch_size: int
    micro_batches: int

    @property
    def num_tokens(self) -> int:
        """The most that one expert may get."""
        return self.micro_batches * self.micro_batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One of several processes of this host that are measured beside each other, and its cores, of which it computes on
    ``num_cores``. Names and meanings are those of ``profile``."""

    model: str
    accelerator: str
    emulate: str
    sizes: Sizes
    num_processes: int
    num_stages: int | None
    cores: tuple[int, ...]
    num_cores: int


def profile(
    model: str | Path,
    *,
    dtype: str = "bf16",
    seq_len: int = 512,
    micro_batch_size: int = 1,
    micro_batches: int = 4,
    accelerator: str = "auto",
    emulate: str | None = None,
    cpu_speed: float = 1.0,
    num_processes: int = 1,
    num_stages: int | None = None,
    refresh: bool = False,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Profile:
    """The profile of ``model``'s blocks here, from the cache unless ``refresh``; printed, and written to ``output``.

    Parameters are those of ``isthmus profile``; ``num_processes`` share this host, and what is measured is one's part
    with nothing to do for the others, where a CPU computes beside others that do the same. Only the model's
    configuration is read: weights are random. Blocks for seconds, with the accelerator to itself. Raises ``ValueError``
    or ``OSError`` for input that cannot work.
    """
    if not 0 < cpu_speed <= 1:
        raise IsthmusError(f"cpu_speed: got {cpu_speed}, wanted a fraction above 0 and at most 1, such as 0.25.")
    keep_freed_memory()
    emulation = parse_emulate(emulate or "")
    device = device_to_measure(accelerator, emulation)
    sizes = Sizes(dtype=dtype, seq_len=seq_len, micro_batch_size=micro_batch_size, micro_batches=micro_batches)
    asked: dict[str, Any] = {"sizes": sizes, "num_processes": num_processes, "num_stages": num_stages}
    num_cores = cores_of_each(num_processes)
    with device, TrainingProgress(1) as progress:
        told: dict[str, Any] = {"refresh": refresh, "progress": progress.phase}
        if device.device.type == "cpu" and len(seats := _seats(num_processes)) > 1:
            asked |= {"accelerator": accelerator, "emulate": emulate or "", "num_cores": num_cores or 1}
            measured = _beside_neighbours([Neighbour(model=str(model), cores=seat, **asked) for seat in seats], **told)
        else:
            measured = measure_blocks(model, device, emulation=emulation, num_cores=num_cores, **asked, **told)
    result = at_cpu_speed(measured, cpu_speed)
    show(result, console or Console())
    if output is not None:
        atomic_write(output, to_json(result))
    return result


def _seats(num_processes: int) -> list[tuple[int, ...]]:
    """The cores that processes of this host are pinned to, each only once: as many as can compute at once."""
    cores = sorted(os.sched_getaffinity(0))
    return list(dict.fromkeys(tuple(own_cores(cores, place, num_processes)) for place in range(num_processes)))


def _beside_neighbours(
    neighbours: Sequence[Neighbour], *, refresh: bool, progress: Callable[[str, float], None]
) -> Profile:
    """What the first of them measures while the others do the same; from the cache as ``measure_profile``."""
    questions = [to_json(neighbour) for neighbour in neighbours]
    identity: dict[str, object] = {
        "cpu": cpu_name(),
        "quota": cpu_quota(),
        "model": load_config(neighbours[0].model).to_json_string(),
        "neighbours": questions,
        "in_step": IN_STEP,
        "versions": VERSIONS,
    }
    command = [sys.executable, "-m", "isthmus.tuning.neighbours"]
    return cached_profile(
        identity, lambda: from_json(Profile, measure_together(command, questions, progress)), refresh=refresh
    )


def device_to_measure(accelerator: str, emulation: Emulation) -> Accelerator:
    """One whose memory does not limit what is measured. Raises ``IsthmusError`` as ``create`` does."""
    is_emulated = accelerator == "emulated" or (accelerator == "auto" and emulation)
    memory_bytes = psutil.virtual_memory().total if is_emulated else None
    options = SessionOptions(accelerator=accelerator, accelerator_memory_bytes=memory_bytes, emulation=emulation)
    return accelerator_of(options, Recorder(enabled=False))


def measure_blocks(
    model: str | Path,
    device: Accelerator,
    sizes: Sizes,
    *,
    emulation: Emulation,
    num_cores: int | None,
    num_layers: int | None = None,
    num_processes: int = 1,
    num_stages: int | None = None,
    refresh: bool = False,
    progress: Callable[[str, float], None] = lambda text, fraction: None,
) -> Profile:
    """The profile of ``model``'s blocks (of its first ``num_layers`` layers), from the cache unless ``refresh``, and
    measured with what a step needs: here on ``num_cores``, as one of ``num_processes``. Of a deep model a few layers
    are measured. Sets PyTorch's threads. Blocks for seconds."""
    whole = load_config(model, num_layers=num_layers)
    config = _few_layers(model, whole)
    blocks = _build(config, sizes.dtype, device)
    num_threads, num_cpu_threads = thread_split(device, emulation, num_cores)
    torch.set_num_threads(num_threads)
    _bind_random(blocks, device)
    example = _random_batch(blocks, sizes.micro_batch_size, sizes.seq_len)
    one_of = None
    if num_processes > 1:
        one_of = _one_of_several(whole, sizes.dtype, device, example, num_processes, num_stages)
    measured = measure_profile(
        blocks,
        device,
        example,
        max_tokens=sizes.num_tokens,
        num_cpu_threads=num_cpu_threads,
        refresh=refresh,
        in_step=True,
        one_of=one_of,
        progress=progress,
    )
    if config is whole:
        return measured
    return _of_whole(measured, blocks.spec, model_spec(whole), is_part=num_processes > 1)


def _few_layers(model: str | Path, whole: PretrainedConfig) -> PretrainedConfig:
    """Of a deep model its first layers, among which there are all kinds of layers that it has."""
    spec = model_spec(whole)
    kinds, num_layers = _kinds(spec), spec.num_layers
    number = FEW_LAYERS // 2
    while 2 * number < num_layers:
        with contextlib.suppress(ValueError):  # no routed experts in so few layers
            config = load_config(model, num_layers=number)
            if _kinds(model_spec(config)) == kinds:
                return config
        number *= 2
    return whole


def _kinds(spec: ModelSpec) -> set[tuple[ExpertSpec | None, int]]:
    return set(zip(spec.layers, spec.dense_numel, strict=True))


def _of_whole(profile: Profile, few: ModelSpec, whole: ModelSpec, *, is_part: bool) -> Profile:
    """The profile of a model of which ``few`` layers were measured: the dense part of a layer takes what its parameters
    take, and what lies outside every layer is spread over more of them. What ``is_part`` was measured of the whole."""
    share = statistics.fmean(whole.dense_numel) / statistics.fmean(few.dense_numel)
    outer = profile.outer_forward_s_per_token, profile.outer_backward_s_per_token
    dense = profile.dense_forward_s_per_token, profile.dense_backward_s_per_token
    forward_s, backward_s = (
        # One of several has its outer part spread over these few layers, and its own layers measured as they are.
        (total - spread / few.num_layers) * (1.0 if is_part else share) + spread / whole.num_layers
        for total, spread in zip(dense, outer, strict=True)
    )
    return replace(profile, dense_forward_s_per_token=forward_s, dense_backward_s_per_token=backward_s)


def _build(config: PretrainedConfig, dtype: str, device: Accelerator) -> MoeModel:
    """The model as a session on this device makes it, without weights."""
    blocks = MoeModel.build(config, dtype)
    blocks.module.train()
    keep_documents_apart(blocks.module)
    if not device.is_separate:
        use_blocked_attention(blocks.module)
    return blocks


def _bind_random(blocks: MoeModel, device: Accelerator) -> None:
    """Gives everything but the experts random weights on the device."""
    for key, layout in blocks.layouts.items():
        if not key.is_expert and key in blocks.held_layouts:
            blocks.bind(key, device.allocate((layout.numel,), torch_dtype(layout.dtype)).normal_(std=0.02))
    blocks.move_buffers(device.device)


def _one_of_several(
    config: PretrainedConfig,
    dtype: str,
    device: Accelerator,
    example: MicroBatch,
    num_processes: int,
    num_stages: int | None,
) -> OneOfSeveral:
    """The last of several processes, whose stages are equal."""

    def measure() -> tuple[float, float]:
        blocks = _build(config, dtype, device)
        between = interruption(blocks, device, example)
        place: Any = SimpleNamespace(rank=num_processes - 1, size=num_processes)
        pipeline = Pipeline(blocks, place, divide(blocks.spec, num_ranks=num_processes, num_stages=num_stages))
        _bind_random(blocks, device)
        return measure_dense(
            blocks,
            example.inputs,
            num_tokens=example.num_tokens,
            synchronize=device.synchronize,
            run=pipeline.rehearse_taped(between),
            interrupt=between,
        )

    return OneOfSeveral(num_processes, num_stages, measure)


def cores_of_each(num_processes: int) -> int | None:
    """Of several processes of this host; None for a single one, which takes what it may."""
    return None if num_processes == 1 else max(1, num_cpus_usable() // num_processes)


def _random_batch(model: MoeModel, micro_batch_size: int, seq_len: int) -> MicroBatch:
    """Tokens of two documents in every sequence, as training data is packed."""
    batch = largest_micro_batch(micro_batch_size, seq_len, seq_len if model.spec.is_encoder_decoder else None)
    ids = torch.randint(0, model.spec.vocab_size, (micro_batch_size, seq_len))
    labels = ids.where(batch.inputs["labels"] != IGNORED, IGNORED)
    return replace(batch, inputs=batch.inputs | {"input_ids": ids, "labels": labels}, num_tokens=ids.numel())


def show(profile: Profile, console: Console) -> None:
    """Prints the profile: a table per shape of expert, and the rates of everything else."""
    for key, times in profile.experts.items():
        console.print(_experts_table(key, times))
    machine = profile.hardware
    rates = Table(show_header=False, title=f"{machine.cpu_name}, {machine.accelerator_name}, {profile.dtype}")
    if machine.link is None:
        rates.add_row("links", "none: experts are computed where they are")
    else:
        alone = (profile.h2d_s_per_byte, profile.d2h_s_per_byte)
        both = (profile.h2d_duplex_s_per_byte, profile.d2h_duplex_s_per_byte)
        for name, s_per_byte in (("up / down, alone", alone), ("up / down, at once", both)):
            rates.add_row(name, " / ".join(f"{human_bytes(1 / value)}/s" for value in s_per_byte))
        rates.add_row("latency of a copy", human_s(profile.copy_latency_s))
        rates.add_row("copies in flight", str(profile.copy_window))
    rates.add_row("optimizer", f"{human_s(profile.optimizer_s_per_parameter * 1e6)} per million parameters")
    dense = (profile.dense_forward_s_per_token, profile.dense_backward_s_per_token)
    per_thousand = " / ".join(human_s(value * 1000) for value in dense)
    rates.add_row("dense part of a layer, forward / backward", f"{per_thousand} per thousand tokens")
    console.print(rates)


def _experts_table(key: str, times: ExpertTimes) -> Table:
    table = Table(title=f"one expert {key}")
    curves = {
        "CPU forward": times.cpu_forward,
        "CPU backward": times.cpu_backward,
        "accelerator forward": times.accelerator_forward,
        "accelerator backward": times.accelerator_backward,
    }
    for heading in ("tokens", *curves):
        table.add_column(heading, justify="right")
    grid = times.cpu_forward.num_tokens
    seconds = [evaluate(curve, grid) for curve in curves.values()]
    for num_tokens, *row in zip(grid, *seconds, strict=True):
        table.add_row(str(num_tokens), *(human_s(float(value)) for value in row))
    return table
