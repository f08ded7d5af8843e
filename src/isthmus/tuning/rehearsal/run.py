"""Plays steps of a run through: all its processes on one host, whose cores they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from isthmus.models.skeleton import torch_dtype
from isthmus.planning.block_seconds import Costs
from isthmus.planning.bound import step_bound
from isthmus.planning.memory import accelerator_memory, num_dense_buffers
from isthmus.planning.problem import CostModel
from isthmus.planning.stages import map_stages
from isthmus.profiling.crowding import Forgetting
from isthmus.spec.model import OUTER_LAYER, ModelSpec, UnitKey, UnitLayout
from isthmus.spec.plan import Plan
from isthmus.spec.profile import Profile
from isthmus.spec.timeline import LANES, Timeline
from isthmus.tuning.deferred import DeferredWork
from isthmus.tuning.dense import DenseUnits
from isthmus.tuning.gradients import GradientSink
from isthmus.tuning.loader import ExpertLoader, HostLoader
from isthmus.tuning.pipeline.company import own_cores
from isthmus.tuning.policies import POLICIES, InPlace, PolicySeat, PolicySetup
from isthmus.tuning.protocols import Loader, Policy
from isthmus.tuning.rehearsal.clock import Changes, Clock, Cores
from isthmus.tuning.rehearsal.guess import Guess
from isthmus.tuning.rehearsal.machine import ClockAccelerator, ClockRecorder, ClockWorker, LinkCosts
from isthmus.tuning.rehearsal.process import Mail, Process, steps_of
from isthmus.tuning.rehearsal.scenario import Scenario
from isthmus.tuning.rehearsal.waves import Scene
from isthmus.tuning.session import thread_split
from isthmus.tuning.step_optimizer import StepOptimizer

ON_CPU = ("emulated", "host")
"""Accelerators that are the CPU's own cores."""
NUM_STEPS = 6
WARM_STEPS = 2
"""Of these: before them a policy knows no popularity, and has not found out what its machine really takes."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """Steps as they were played. Sequences are by process."""

    steps_s: tuple[float, ...]
    timelines: tuple[Timeline, ...]
    busy_s: tuple[dict[str, float], ...]
    """By lane, of all steps together."""
    num_bytes: tuple[dict[str, int], ...]
    cpu_rows_share: float
    bound_s: float
    """Of the process whose bound is highest, as ``tune`` reports it."""


def play(scenario: Scenario, steps: Sequence[dict[int, list[int]]], *, times_decisions: bool = True) -> Played:
    """``steps``: of each the rows (E,) by layer. ``times_decisions``: the policy's own time is measured, here, and
    counted as the run's. Blocks for about the time of planning as often."""
    clock = Clock()
    forget = Forgetting() if times_decisions else None
    mail = Mail(clock, scenario.num_processes)
    cores: dict[tuple[int, ...], Cores] = {}
    processes, seconds, bounds_s = [], [], []
    for rank in range(scenario.num_processes):
        own = tuple(own_cores(list(range(scenario.num_cores)), rank, scenario.num_processes))
        shared = cores.setdefault(own, Cores(clock, len(own)))
        processes.append(_Maker(scenario, rank, clock, shared, mail, forget).process())

    def run(process: Process, bounding_s: float) -> None:
        """The trainer bounds every step, which takes time that belongs to it."""
        for step_s in steps_of(process, steps, lambda: process.scene.cores.work(bounding_s)):
            if not process.rank:
                seconds.append(step_s)

    for process in processes:
        start_s = time.thread_time()
        bounds_s.append(_bound_s(scenario, process, steps[-1]))
        taken_s = time.thread_time() - start_s if times_decisions else 0.0
        clock.start(lambda process=process, taken_s=taken_s: run(process, taken_s))
    clock.run()
    if len(seconds) < len(steps):
        raise RuntimeError(f"the rehearsal stopped in step {len(seconds) + 1}: a process waits for what never comes")
    return Played(
        steps_s=tuple(seconds),
        timelines=tuple(process.scene.recorder.timeline() for process in processes),
        busy_s=tuple({lane: process.scene.recorder.busy_s(lane) for lane in LANES} for process in processes),
        num_bytes=tuple(dict(process.scene.accelerator.copied_bytes()) for process in processes),
        bound_s=max(bounds_s),
        cpu_rows_share=sum(p.num_cpu_rows for p in processes) / max(1, sum(p.num_rows for p in processes)),
    )


def _bound_s(scenario: Scenario, process: Process, counts_LE: dict[int, list[int]]) -> float:
    """Of a step of one process, as ``tuning/bound.py`` has it."""
    profile, layouts = scenario.profile, process.dense.store.layouts
    num_tokens = process.num_tokens * process.num_micro_batches
    here = {layer: counts_LE[layer] for layer in process.moe_layers}
    num_parameters = sum(layout.numel for layout in layouts.values())
    if not scenario.is_separate:
        costs = CostModel(profile, process.spec)
        experts = sum(
            sum(costs.problem(layer, counts, is_backward=is_backward).accelerator_s)
            for layer, counts in here.items()
            for is_backward in (False, True)
        )
        per_token = profile.dense_forward_s_per_token + profile.dense_backward_s_per_token
        dense_s = num_tokens * len(process.layers) * per_token
        return dense_s + experts + num_parameters * profile.optimizer_s_per_parameter
    dense = process.dense
    bound = step_bound(
        profile,
        process.scene.costs.spec.part(process.layers, has_outer=not process.rank),
        here,
        num_tokens=num_tokens,
        num_slots=process.num_slots,
        num_optimizer_parameters=num_parameters,
        dense_h2d_bytes=dense.h2d_bytes(is_backward=False),
        dense_backward_h2d_bytes=dense.h2d_bytes(is_backward=True),
        dense_d2h_bytes=sum(dense.store.gradient(key).nbytes for key in dense.keys),
    )
    return bound.seconds


class _Store:
    """As ``ParameterStore``, without memory."""

    def __init__(self, layouts: dict[UnitKey, UnitLayout]) -> None:
        self._layouts = self.layouts = layouts
        self.keys = tuple(sorted(layouts))

    def layout(self, key: UnitKey) -> UnitLayout:
        return self._layouts[key]

    def numel(self, key: UnitKey) -> int:
        return self._layouts[key].numel

    def weight(self, key: UnitKey) -> Tensor:
        layout = self._layouts[key]
        return torch.empty(layout.numel, dtype=torch_dtype(layout.dtype), device="meta")

    gradient = weight


class _Optimizer:
    """As ``StoreOptimizer``: takes seconds."""

    def __init__(self, store: _Store, costs: Costs, cores: Cores, num_threads: int, mail: Mail) -> None:
        self.store, self._costs, self._cores, self._mail = store, costs, cores, mail
        self._num_threads = num_threads
        self._present: dict[UnitKey, bool] = {}
        """Units with a gradient, and whether its norm is known."""

    def gradient_destination(self, key: UnitKey) -> tuple[Tensor, bool]:
        adds = key in self._present
        self._present[key] = False
        return self.store.gradient(key), adds

    def add_gradient(self, key: UnitKey, flat: Tensor) -> None:
        self._cores.work(self._costs.adding_s(self.store.numel(key)))

    def finish_gradient(self, key: UnitKey) -> None:
        if self._present.get(key, True):
            return
        self._present[key] = True
        self._cores.work(self._costs.norm_s(self.store.numel(key)), self._num_threads)

    def begin_step(self, step: int, learning_rate: float) -> float:
        for key in sorted(self._present):
            self.finish_gradient(key)
        self._present.clear()
        self._mail.meet()  # the norm is that of all processes
        return 1.0

    def step_units(self, keys: Sequence[UnitKey]) -> None:
        seconds = self._costs.steps_s(sum(self.store.numel(key) for key in keys))
        self._cores.work(seconds, self._num_threads, self._costs.profile.optimizer_slowdown)

    def end_step(self) -> None: ...


class _Maker:
    """Puts one process together, as ``Session`` does."""

    def __init__(
        self, scenario: Scenario, rank: int, clock: Clock, cores: Cores, mail: Mail, forget: Forgetting | None
    ) -> None:
        """``forget`` None: decisions take no time."""
        self.scenario, self.rank, self.clock, self.cores, self.mail = scenario, rank, clock, cores, mail
        self.forget = forget
        self.division = scenario.division
        self.num_in_flight = scenario.num_in_flight
        self.layers = self.division.layers_of(rank)
        self.is_pipelined = scenario.num_processes > 1
        whole = scenario.blueprint.spec
        self.spec: ModelSpec = whole.part(self.layers, has_outer=not rank) if self.is_pipelined else whole
        self.costs = Costs(scenario.profile, whole)
        self.recorder = ClockRecorder(clock)
        self.accelerator = ClockAccelerator(clock, cores, self.recorder, _link_costs(scenario.profile))
        self.accelerator.is_separate = scenario.is_separate
        layers = {*self.layers, *(() if rank else (OUTER_LAYER,))}
        layouts = scenario.blueprint.layouts
        self.store = _Store({key: layout for key, layout in layouts.items() if key.layer in layers})
        num_cores = max(1, scenario.num_cores // scenario.num_processes)
        self.num_threads, _ = thread_split(self.accelerator, None, num_cores)
        if scenario.profile.hardware.accelerator not in ON_CPU:
            self.num_threads = 1
        self.num_cpu_threads = scenario.profile.hardware.num_cpu_threads

    def process(self) -> Process:
        scenario, recorder, hardware = self.scenario, self.recorder, self.scenario.profile.hardware
        worker = ClockWorker(self.clock, recorder) if scenario.is_separate else None
        condition: Any = Changes(self.clock)
        optimizer: Any = _Optimizer(self.store, self.costs, self.cores, self.num_cpu_threads, self.mail)
        steps = StepOptimizer(
            optimizer,
            self.store.keys,
            worker,  # type: ignore[arg-type]
            recorder,
            on_step=lambda: begin_step(),
            on_dense_stepped=lambda layer: dense.upload(layer),
            on_layer_stepped=lambda layer: policy.layer_ready(layer),
            condition=condition,
        )
        plan = self._plan()
        num_buffers = self.spec.num_layers if plan.is_dense_resident else num_dense_buffers(self.spec)
        model: Any = SimpleNamespace(spec=self.spec, bind=lambda key, flat: None, parameters_of=lambda key: {})
        store: Any = self.store
        dense = DenseUnits(model, store, self.accelerator, optimizer, steps.complete, num_buffers=num_buffers)
        loader, policy, guess = self._placed(plan)
        scene = Scene(
            clock=self.clock,
            cores=self.cores,
            device=self.cores if hardware.accelerator in ON_CPU else Cores(self.clock, 1),
            recorder=recorder,
            accelerator=self.accelerator,
            worker=worker,
            loader=loader,
            gradients=GradientSink(self.accelerator, loader, optimizer, steps.complete),
            deferred=DeferredWork(),
            costs=self.costs,
            num_threads=self.num_threads,
            num_cpu_threads=self.num_cpu_threads,
        )

        def begin_step() -> None:
            policy.begin_step()
            dense.begin_step()

        begin_step()
        for layer in dense.layers:
            dense.upload(layer)
            policy.layer_ready(layer)
        return Process(
            self.rank,
            self.division,
            scene,
            dense,
            policy,
            steps,
            self.mail,
            num_tokens=scenario.blueprint.num_tokens,
            num_micro_batches=scenario.micro_batches,
            num_in_flight=self.num_in_flight,
            decide=self._decide,
            guess=guess,
            num_slots=plan.num_slots,
        )

    def _decide(self, ask: Callable[[], object]) -> None:
        """With caches as cold as in a step, where the time counts."""
        if self.forget is None:
            ask()
            return
        self.forget()
        start_s = time.thread_time()
        ask()
        self.cores.work(time.thread_time() - start_s)

    def _plan(self) -> Plan:
        """As ``placement.fit`` divides the accelerator."""
        scenario = self.scenario
        own = self.division.stages_of(self.rank)
        plan = Plan(
            policy=scenario.policy,
            stages=own,
            num_slots=0,
            slot_bytes=0,
            dense_bytes=0,
            activation_bytes=0,
            copy_window=scenario.profile.copy_window,
            num_waves=self.num_in_flight if self.is_pipelined else min(2, self.num_in_flight),
            num_in_flight=self.num_in_flight,
        )
        if not scenario.is_separate:
            return plan
        part = scenario.part(self.rank)
        memory = accelerator_memory(part, self.num_in_flight, scenario.policy, scenario.memory_bytes)
        if not self.is_pipelined:
            most = max(part.experts, default=0)
            own = map_stages(self.spec, num_slots=memory.num_slots - most, num_stages=scenario.num_stages)
        return replace(
            plan,
            stages=own,
            num_slots=memory.num_slots,
            slot_bytes=memory.slot_bytes,
            is_dense_resident=memory.is_dense_resident,
        )

    def _placed(self, plan: Plan) -> tuple[Loader, Policy, Guess]:
        dtype = torch_dtype(self.scenario.blueprint.dtype)
        # A GPU predicts beside what else it does, and the host goes on.
        takes_time = self.forget is not None and self.scenario.profile.hardware.accelerator == "emulated"
        guess = Guess(self.spec, dtype, takes_time=takes_time)
        if not self.scenario.is_separate or not self.spec.moe_layers:
            return HostLoader(self.store.weight), InPlace(), guess
        seat = PolicySeat()
        changed: Any = Changes(self.clock)
        loader = ExpertLoader(
            self.accelerator,
            num_slots=plan.num_slots,
            slot_numel=plan.slot_bytes // dtype.itemsize,
            dtype=dtype,
            source=self.store.weight,
            window=plan.copy_window,
            next_use=seat.next_use,
            changed=changed,
        )
        scenario = self.scenario
        predictor: Any = guess
        setup = PolicySetup(
            spec=self.spec,
            costs=CostModel(scenario.profile, self.spec),
            plan=plan,
            loader=loader,
            num_tokens=scenario.blueprint.num_tokens * self.num_in_flight,
            recorder=self.recorder,
            predictor=predictor,
            is_pipelined=self.is_pipelined,
        )
        seat.policy = POLICIES[scenario.policy](setup)
        return loader, seat, guess


def _link_costs(profile: Profile) -> LinkCosts:
    return LinkCosts(
        s_per_byte={"h2d": profile.h2d_s_per_byte, "d2h": profile.d2h_s_per_byte},
        latency_s=profile.copy_latency_s,
        core_s_per_byte=profile.copy_core_s_per_byte,
    )


def whole_steps(steps: Iterator[dict[int, Any]], number: int) -> list[dict[int, list[int]]]:
    """The first ``number`` of ``steps``, in whole rows."""
    return [
        {layer: [round(count) for count in counts_E] for layer, counts_E in next(steps).items()} for _ in range(number)
    ]
