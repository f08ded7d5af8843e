"""Puts a model, its parameters, an accelerator and a policy together into something that can take training steps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from isthmus.models.attention import use_blocked_attention
from isthmus.models.config import load_config
from isthmus.models.expert_math import ExpertMath
from isthmus.models.moe_model import MoeModel
from isthmus.models.reader import read_checkpoint
from isthmus.planning.memory import host_bytes
from isthmus.planning.problem import CostModel
from isthmus.planning.stages import Division, divide
from isthmus.reporting.environment import num_cpus_usable
from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Plan
from isthmus.spec.profile import Profile
from isthmus.spec.units import Emulation
from isthmus.training.heap import keep_freed_memory
from isthmus.tuning.accelerator import create
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.cpu_worker import CpuWorker
from isthmus.tuning.data import MicroBatch, keep_documents_apart
from isthmus.tuning.deferred import DeferredWork
from isthmus.tuning.dense import DenseUnits
from isthmus.tuning.engine import Engine, StepCounts
from isthmus.tuning.gradients import GradientSink
from isthmus.tuning.grouped import GroupedExperts, should_group
from isthmus.tuning.host_buffers import HostBuffers
from isthmus.tuning.loader import ExpertLoader
from isthmus.tuning.measure import at_cpu_speed
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore
from isthmus.tuning.pipeline.company import require_memory
from isthmus.tuning.pipeline.engine import PipelineEngine
from isthmus.tuning.pipeline.links import Links
from isthmus.tuning.pipeline.pipeline import Pipeline
from isthmus.tuning.placement import Part, Placement, place, place_dense
from isthmus.tuning.policies import POLICIES, PolicySeat
from isthmus.tuning.step_optimizer import StepOptimizer
from isthmus.tuning.wave import Resources

MOST_EVALUATED = 4
"""Micro-batches at once: more reuse no more of what is loaded than is worth their memory."""
ROW_MULTIPLE = 16
"""Rows of bf16 experts in place come in multiples of this, see ``pad_rows``: some 3 % more work for few sizes."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to train, apart from the data. Names and meanings are those of ``isthmus tune``."""

    dtype: str = "fp32"
    policy: str = "affinity"
    accelerator: str = "auto"
    accelerator_memory_bytes: int | None = None
    emulation: Emulation | None = None
    cpu_speed: float = 1.0
    num_stages: int | None = None
    num_layers: int | None = None
    num_waves: int | None = None
    num_in_flight: int | None = None
    """Most micro-batches that go forward before the first goes backward; None: as many as fit."""
    num_cores: int | None = None
    """What to compute with; None: ``OMP_NUM_THREADS`` or what this process may use."""
    wire: str | None = None
    """One of ``WIRES``: how hidden states and their gradients go between processes; None: as they are."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """One optimizer step. Bytes are what was copied since the step before; ``is_finite`` False: nothing was changed."""

    loss: float
    gradient_norm: float
    num_tokens: int
    h2d_bytes: int
    d2h_bytes: int
    counts: StepCounts
    is_finite: bool = True


class Session:
    """A model in training. ``close`` ends its threads and gives memory back; use it as a context manager."""

    def __init__(
        self,
        path: Path,
        options: SessionOptions,
        example: list[MicroBatch],
        recorder: Recorder,
        progress: Callable[[str, float], None] = lambda text, fraction: None,
        copy_delay: Callable[[], float] | None = None,
        links: Links | None = None,
        largest: MicroBatch | None = None,
        division: Division | None = None,
    ) -> None:
        """Reads the checkpoint at ``path`` and measures what the plan needs. ``example``: one step's micro-batches, for
        their sizes. ``copy_delay`` (for tests): seconds by which an emulated copy is late. ``links``: this process is
        one of several, each of which makes a session with the same arguments and calls the same methods. ``largest``:
        a micro-batch that takes as much memory as any that will come, where those of ``example`` may take less.
        ``division``: which process has which layers; None: stages of equal size."""
        keep_freed_memory()
        self.options = options
        self.recorder = recorder
        self.path = path
        self.model = MoeModel.build(load_config(path, num_layers=options.num_layers), options.dtype)
        self.model.module.train()
        keep_documents_apart(self.model.module)
        self.accelerator = accelerator_of(options, recorder, copy_delay)
        self._worker: CpuWorker | None = None
        self.links = links
        self.pipeline: Pipeline | None = None
        self.num_steps = 0
        """The number of the last step that ``train_step`` took."""
        try:
            if not self.accelerator.is_separate:
                use_blocked_attention(self.model.module)
            if links is not None:
                division = division or divide(self.model.spec, num_ranks=links.size, num_stages=options.num_stages)
                self.pipeline = Pipeline(self.model, links, division, options.wire)
            self._build(example, [largest] * len(example) if largest else example, progress)
        except BaseException:
            self.close()
            raise

    def _build(
        self, example: list[MicroBatch], largest: list[MicroBatch], progress: Callable[[str, float], None]
    ) -> None:
        options, accelerator, model = self.options, self.accelerator, self.model
        require_memory(sum(host_bytes(model.held_layouts.values()).values()), self.links)
        self._read_weights(progress)
        num_threads, num_cpu_threads = thread_split(accelerator, options.emulation, options.num_cores)
        torch.set_num_threads(num_threads)
        self.optimizer = StoreOptimizer(
            self.store,
            learning_rate=0.0,
            betas=options.betas,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm,
            num_threads=num_cpu_threads,
            sum_over_ranks=self._sum_over_ranks,
        )
        if accelerator.is_separate:
            self._worker = CpuWorker(self.recorder, num_threads=num_cpu_threads, speed=options.cpu_speed)
        self.steps = StepOptimizer(
            self.optimizer,
            self.store.keys,
            self._worker,
            self.recorder,
            on_step=self._begin_step,
            on_dense_stepped=lambda layer: self.dense.upload(layer),
            on_layer_stepped=lambda layer: self.placement.policy.layer_ready(layer),
        )
        model.move_buffers(accelerator.device)
        part = self.pipeline and Part(stages=self.pipeline.stages, run=self.pipeline.rehearse, least=self._least_of_all)
        self.dense, room = place_dense(
            model, self.store, accelerator, largest, options.policy, self._dense_units, part, options.num_in_flight
        )
        self.placement: Placement = place(
            model,
            self.store,
            accelerator,
            self.dense,
            example,
            room=room,
            policy=options.policy,
            num_stages=options.num_stages,
            num_waves=options.num_waves,
            num_cpu_threads=num_cpu_threads,
            cpu_speed=options.cpu_speed,
            progress=progress,
            part=part,
        )
        parts = self._resources(), self.dense, self.placement.policy, self.steps, room.num_in_flight
        self.engine = PipelineEngine(self.pipeline, *parts) if self.pipeline else Engine(model, *parts)
        self.weights_changed()

    def _least_of_all(self, num_in_flight: int) -> int:
        """All ranks must take the same micro-batches through at once."""
        assert self.links is not None
        return min(self.links.gather(num_in_flight, "how many micro-batches fit"))

    def _sum_over_ranks(self, squared_norm: float) -> float:
        """In the order of ranks, so that all get the same bits."""
        if self.links is None:
            return squared_norm
        told = self.links.gather(squared_norm.hex(), "the norm of the gradients")
        return math.fsum(map(float.fromhex, told))

    def _read_weights(self, progress: Callable[[str, float], None]) -> None:
        self.store = ParameterStore(self.model.held_layouts, self.accelerator.allocate_host)
        read_checkpoint(
            self.path,
            self.model,
            lambda key: self.store.named(key, "master"),
            progress=lambda done: progress("reading weights", done),
        )
        for key in self.store.keys:
            self.store.publish(key)

    def _dense_units(self, num_buffers: int) -> DenseUnits:
        """Everything but the routed experts, on the accelerator with as many weights as fit there. Blocks."""
        dense = DenseUnits(
            self.model, self.store, self.accelerator, self.optimizer, self.steps.complete, num_buffers=num_buffers
        )
        for layer in dense.layers:
            dense.upload(layer)
        self.accelerator.synchronize()
        return dense

    def _resources(self) -> Resources:
        accelerator, model, loader = self.accelerator, self.model, self.placement.loader
        grouped = None
        if isinstance(loader, ExpertLoader) and should_group(model, accelerator):
            grouped = GroupedExperts.of(model, loader)
        return Resources(
            accelerator=accelerator,
            loader=loader,
            store=self.store,
            gradients=GradientSink(accelerator, loader, self.optimizer, self.steps.complete),
            buffers=HostBuffers(accelerator.allocate_host),
            worker=self._worker,
            math={
                layer: ExpertMath(model.moe_parts[layer].spec, model.experts[layer]) for layer in model.spec.moe_layers
            },
            deferred=DeferredWork(),
            row_multiple=1 if accelerator.is_separate or model.dtype == "fp32" else ROW_MULTIPLE,
            grouped=grouped,
        )

    def use(self, policy: str, *, cpu_speed: float = 1.0) -> None:
        """Another policy, and another emulated CPU speed, from the next step on. Blocks until the last step is done.

        For comparisons on one model: plan and memory stay as they are, and the new policy starts without history.
        """
        setup, seat = self.placement.setup, self.placement.policy
        if setup is None or not isinstance(seat, PolicySeat) or self._worker is None:
            raise IsthmusError(
                "policy: there is nothing to choose without a separate accelerator; use --accelerator emulated or cuda."
            )
        self.finish()
        self._worker.speed = cpu_speed
        measured = at_cpu_speed(self.placement.profile, cpu_speed / self.placement.profile.hardware.cpu_speed)
        profile = replace(measured, hardware=replace(measured.hardware, cpu_speed=cpu_speed))
        costs = CostModel(profile, self.model.spec)
        self.placement = replace(self.placement, profile=profile)
        seat.policy = POLICIES[policy](replace(setup, costs=costs))
        self.weights_changed()

    def weights_changed(self) -> None:
        """To be called after the masters in the store were written from outside (a checkpoint was loaded)."""
        for key in self.store.keys:
            self.store.publish(key)
        self._begin_step()
        for layer in self.dense.layers:
            self.dense.upload(layer)
            self.placement.policy.layer_ready(layer)

    def _begin_step(self) -> None:
        self.placement.policy.begin_step()
        self.dense.begin_step()

    @property
    def plan(self) -> Plan:
        return self.placement.plan

    @property
    def profile(self) -> Profile:
        return self.placement.profile

    def train_step(self, batches: list[MicroBatch], *, step: int, learning_rate: float) -> StepOutcome:
        """One optimizer step (numbered from 1). The update overlaps whatever comes next; ``finish`` waits for it.

        A loss or gradient that is not finite changes no parameter; the outcome says so.
        """
        before = self.accelerator.copied_bytes()
        start_s = self.recorder.now_s()
        loss = self.engine.train_step(batches, seed=self.options.seed * 1_000_003 + step)
        is_finite = loss == loss and abs(loss) != float("inf")
        norm = self.steps.begin(step, learning_rate) if is_finite else float("nan")
        self.recorder.step(step, start_s, self.recorder.now_s())
        after = self.accelerator.copied_bytes()
        self.num_steps = step
        return StepOutcome(
            loss=loss,
            gradient_norm=norm,
            num_tokens=sum(batch.num_tokens for batch in batches),
            h2d_bytes=after["h2d"] - before["h2d"],
            d2h_bytes=after["d2h"] - before["d2h"],
            counts=self.engine.counts,
            is_finite=is_finite,
        )

    def evaluate(self, batches: list[MicroBatch]) -> float:
        """Mean loss over the label tokens of all the given micro-batches. A few run together: no more than there is
        room for in training."""
        at_once = min(MOST_EVALUATED, self.plan.num_in_flight)
        parts = [batches[start : start + at_once] for start in range(0, len(batches), at_once)]
        losses = [(self.engine.evaluate(part), sum(batch.num_label_tokens for batch in part)) for part in parts]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)

    def finish(self) -> None:
        """Blocks until all weights on the host are those after the last step."""
        self.steps.wait()
        self.accelerator.synchronize()

    def close(self) -> None:
        """Idempotent."""
        if self._worker is not None:
            self._worker.close()
        placement = getattr(self, "placement", None)
        if placement is not None:
            placement.loader.close()
        if hasattr(self, "optimizer"):
            self.optimizer.close()
        self.accelerator.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def accelerator_of(
    options: SessionOptions, recorder: Recorder, copy_delay: Callable[[], float] | None = None
) -> Accelerator:
    """A new one. Raises as ``create``."""
    emulation: Emulation = options.emulation or {}
    return create(
        options.accelerator,
        budget_bytes=options.accelerator_memory_bytes,
        recorder=recorder,
        h2d_bytes_per_s=emulation.get("h2d_bytes_per_s"),
        d2h_bytes_per_s=emulation.get("d2h_bytes_per_s"),
        latency_s=emulation.get("latency_s"),
        copy_delay=copy_delay,
    )


def thread_split(
    accelerator: Accelerator, emulation: Emulation | None, num_cores: int | None = None
) -> tuple[int, int]:
    """(threads of the computing thread, threads of the CPU experts) on ``num_cores``, or those this process may use.

    ``OMP_NUM_THREADS``, where it is set, stands for the number of cores.
    """
    cores = num_cores or int(os.environ.get("OMP_NUM_THREADS", num_cpus_usable()))
    if not accelerator.is_separate:
        return cores, cores
    if accelerator.device.type == "cuda":
        return 1, max(1, cores - 1)
    own = (emulation or {}).get("num_threads", max(1, cores // 2))
    return own, max(1, cores - own)
