"""Runs one training step: forward and backward of all micro-batches, breadth-first over layers; where their
activations do not all fit, flight by flight (see ``planning.flights``).

Each micro-batch runs the model's own forward code in a greenlet that stops at every layer's experts. The engine resumes
them group by group (a group is the micro-batches whose experts run together, a wave): while one group's experts are
computed on the CPU, another group's dense part runs on the accelerator. This is the looped breadth-first order of
APTMoE (section 4), one layer at a time, so that each expert is needed once per pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel, on_device
from isthmus.spec.model import OUTER_LAYER, UnitKey
from isthmus.training.random_state import random_state, restore_random_state, seed_random_state
from isthmus.tuning.backward_pass import BackwardPass
from isthmus.tuning.data.batches import MicroBatch
from isthmus.tuning.dense import DenseUnits
from isthmus.tuning.flight import Flight
from isthmus.tuning.forward_pass import ForwardPass
from isthmus.tuning.protocols import Policy
from isthmus.tuning.step_optimizer import StepOptimizer, backward_priority, forward_priority
from isthmus.tuning.tape import ExpertsCall, Tape
from isthmus.tuning.wave import Resources, Wave


@dataclass(slots=True)
class Run:
    """One micro-batch on its way through the model."""

    batch: MicroBatch
    weight: float
    """Its share of the step's loss."""
    tape: Tape
    seed: int
    greenlet: greenlet.greenlet | None = None
    random_state: list[Tensor] | None = None
    dense_layer: int = 0
    """Whose dense part it goes on with."""

    def seed_of(self, place: int, num_layers: int) -> int:
        """Random numbers depend on the micro-batch and the place alone: place 2·l is the code before layer ``l``,
        2·l + 1 the layer. So they are the same wherever the places before run."""
        return (self.seed * (2 * num_layers + 1) + place) % (1 << 63)


@dataclass(slots=True)
class Group:
    """Micro-batches whose experts run together."""

    runs: list[Run]
    waiting: ForwardPass | BackwardPass | None = None
    """Its experts, under way."""
    waves: dict[int, Wave] = field(default_factory=dict)


@dataclass(slots=True)
class StepCounts:
    """What happened to the experts in one step."""

    counts_LE: dict[int, list[int]] = field(default_factory=dict)
    """Tokens per expert of each MoE layer."""
    num_on_cpu: int = 0
    num_on_accelerator: int = 0
    """Experts with tokens, summed over layers and passes."""
    cpu_tokens: int = 0
    tokens: int = 0
    """Routed pairs, summed over layers and passes."""


class Engine:
    """Owns the model's hooks and the order of a step. Not thread-safe: one thread computes."""

    def __init__(
        self,
        model: MoeModel,
        resources: Resources,
        dense: DenseUnits,
        policy: Policy,
        optimizer: StepOptimizer,
        num_in_flight: int,
    ) -> None:
        """``num_in_flight``: micro-batches whose activations there is memory for at once."""
        self.model = model
        self.resources = resources
        self.dense = dense
        self.policy = policy
        self.optimizer = optimizer
        self.num_in_flight = num_in_flight
        self.counts = StepCounts()
        self._counts_LE: dict[int, list[int]] = {}
        """Tokens per expert of each MoE layer in the present pass."""
        self._run: Run | None = None
        self._hub: greenlet.greenlet | None = None
        self._entered: set[int] = set()
        self._left: dict[int, int] = {}
        """How many micro-batches (in backward: groups) have yet to leave each layer."""
        self._arguments = model.forward_arguments()
        self._install()

    # --- hooks inside the model's forward code -------------------------------------------------------------------

    def _install(self) -> None:
        self.model.set_experts_function(self._experts)
        self.model.wrap_routers(self._router_logits)
        for number, layer in enumerate(self.model.layers):
            layer.forward = self._hooked(number, layer.forward)

    def _hooked(self, layer: int, forward: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: self._run_layer(layer, forward, args, kwargs)

    def _run_layer(self, layer: int, forward: Callable[..., object], args: tuple, kwargs: dict) -> object:
        run = self._run
        assert run is not None, "the model runs only inside the engine"
        run.dense_layer = layer + 1
        if layer not in self._entered:
            self._entered.add(layer)
            self._make_ready(layer)
            self.policy.enter_forward(layer)
        self.dense.require(layer)
        self._seed(run, 2 * layer + 1)
        returned = run.tape.run_layer(layer, forward, args, kwargs)
        self._seed(run, 2 * layer + 2)
        self._left[layer] -= 1
        if not self._left[layer]:
            self.dense.leave_forward(layer)
        return returned

    def _seed(self, run: Run, place: int) -> None:
        seed_random_state(self.resources.accelerator.device, run.seed_of(place, self.model.spec.num_layers))

    def _router_logits(self, layer: int, logits: Tensor) -> Tensor:
        return self._run.tape.cut_router_logits(logits) if self._run else logits

    def _make_ready(self, layer: int) -> None:
        self.optimizer.wait_dense(layer)
        self.dense.enter_forward(layer)

    def _experts(self, layer: int, module: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        run, hub = self._run, self._hub
        assert run is not None and hub is not None
        call = ExpertsCall(layer, module, hidden, index, weights)
        run.tape.open_experts(call)
        output = hub.switch(call)
        return run.tape.close_experts(call, output)

    # --- forward ---------------------------------------------------------------------------------------------------

    def _start(self, run: Run) -> None:
        outputs = self.model.module(**on_device(run.batch.inputs, self.resources.accelerator.device), **self._arguments)
        run.tape.loss = outputs.loss

    def _resume(self, run: Run, output: object) -> ExpertsCall | None:
        """Runs a micro-batch up to its next experts (returned) or to its end (None)."""
        self._run = run
        if run.greenlet is None:
            run.greenlet = greenlet.greenlet(self._start)
            self._seed(run, 0)
            argument: object = run
        else:
            assert run.random_state is not None
            restore_random_state(self.resources.accelerator.device, run.random_state)
            argument = output
        with self.resources.accelerator.compute(
            f"dense L{run.dense_layer}", kind="dense", num_tokens=run.batch.num_tokens
        ):
            call = run.greenlet.switch(argument)
        run.random_state = random_state(self.resources.accelerator.device)
        self._run = None
        return call

    def _begin_forward(self, groups: list[Group]) -> None:
        self._hub = greenlet.getcurrent()
        self._counts_LE = {}
        self._entered = set()
        self._left = dict.fromkeys(range(self.model.spec.num_layers), sum(len(group.runs) for group in groups))
        self.policy.begin_forward()
        self.dense.begin_forward()
        if self.dense.of_layer(OUTER_LAYER):
            self._make_ready(OUTER_LAYER)

    def _forward(self, groups: list[Group]) -> None:
        self._begin_forward(groups)
        active = list(groups)
        while active:
            for group in list(active):
                outputs: list[Tensor | None] = [None] * len(group.runs)
                if isinstance(group.waiting, ForwardPass):
                    outputs = list(group.waiting.finish())
                    group.waiting = None
                calls = [self._resume(run, output) for run, output in zip(group.runs, outputs, strict=True)]
                if calls[0] is None:
                    active.remove(group)
                else:
                    self._start_wave(group, [call for call in calls if call is not None])

    def _start_wave(self, group: Group, calls: list[ExpertsCall]) -> None:
        layer = calls[0].layer
        spec = self.model.spec.layers[layer]
        assert spec is not None
        self.optimizer.wait_layer(layer)
        wave = Wave.of(calls, spec.num_experts)
        split = self.policy.split_forward(layer, wave.counts_E, wave.hidden_TH, wave.index_Tk)
        work = ForwardPass(self.resources, wave, split, priority=forward_priority(layer), name=f"L{layer}")
        self._count(work)
        _add_counts(self._counts_LE, layer, wave.counts_E)
        work.start()
        group.waiting = work
        if group.runs[0].tape.recording:
            group.waves[layer] = wave

    def _count(self, work: ForwardPass | BackwardPass) -> None:
        self.counts.num_on_cpu += len(work.on_cpu)
        self.counts.num_on_accelerator += len(work.on_accelerator)
        self.counts.cpu_tokens += work.num_cpu_rows
        self.counts.tokens += sum(work.wave.counts_E)

    # --- backward --------------------------------------------------------------------------------------------------

    def _backward_of(self, group: Group) -> Iterator[None]:
        """Backward of one group, layer by layer; yields when a layer's experts have been queued."""
        for run in group.runs:
            with self.resources.accelerator.compute("head backward", kind="dense"):
                run.tape.backward_loss(run.weight)
        while group.runs[0].tape.segments:
            yield from self._backward_layer(group, [run.tape.segments.pop() for run in group.runs])

    def _backward_layer(self, group: Group, segments: list[Any]) -> Iterator[None]:
        """Backward of one layer of one group: ``segments`` are its micro-batches'."""
        layer = segments[0].layer
        if layer not in self._entered:
            self._entered.add(layer)
            self.dense.enter_backward(layer)
            self.policy.enter_backward(layer)
        wave = group.waves.pop(layer, None)
        gradients: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(segments)
        if wave is not None:
            parts = [segment.gradient_of_experts_output() for segment in segments]
            merged = torch.cat(
                [
                    call.hidden.new_zeros(call.hidden.shape) if part is None else part
                    for part, call in zip(parts, wave.calls, strict=True)
                ]
            )
            priority = backward_priority(layer, self.model.spec.num_layers)
            work = BackwardPass(
                self.resources, wave, self.policy.split_backward(layer), priority=priority, name=f"L{layer}"
            )
            self._count(work)
            work.start(merged)
            group.waiting = work
            yield
            gradients, group.waiting = list(work.finish()), None
            self.resources.deferred.run_before(layer)
        self.dense.require(layer)
        with self.resources.accelerator.compute(f"dense backward L{layer}", kind="dense"):
            for segment, (hidden_gradient, weights_gradient) in zip(segments, gradients, strict=True):
                segment.finish(hidden_gradient, weights_gradient)
        self._left[layer] -= 1
        if not self._left[layer]:
            self._leave(layer)

    def _leave(self, layer: int) -> None:
        self.optimizer.expect(self.dense.that_leave(layer))
        self.dense.leave_backward(layer)
        self.policy.leave_backward(layer)

    # --- whole passes ----------------------------------------------------------------------------------------------

    @staticmethod
    def _runs(flight: Flight, seed: int, *, recording: bool) -> list[Run]:
        return [
            Run(
                batch=batch,
                weight=batch.num_label_tokens / flight.num_label_tokens,
                tape=Tape(recording=recording),
                seed=seed * flight.num_in_step + number,
            )
            for number, batch in enumerate(flight.batches, start=flight.first)
        ]

    def _groups(self, flight: Flight, seed: int, *, recording: bool) -> list[Group]:
        runs = self._runs(flight, seed, recording=recording)
        num_waves = min(self.policy.num_waves, len(runs))
        return [Group(runs=runs[i::num_waves]) for i in range(num_waves)]

    def _loss(self, groups: list[Group]) -> float:
        """These micro-batches' part of the mean over the label tokens of all."""
        loss = 0.0
        for run in (run for group in groups for run in group.runs):
            assert run.tape.loss is not None
            loss += run.weight * float(run.tape.loss.detach())
        return loss

    def train_step(self, batches: list[MicroBatch], *, seed: int) -> float:
        """Forward and backward of all micro-batches. Leaves gradients (complete or on their way) in the store.

        Returns the step's loss: the mean over label tokens; if it is not finite, the store has no gradients.
        ``self.counts`` tells what ran where.
        """
        self.counts = StepCounts()
        loss = 0.0
        for flight in Flight.whole(batches).parts(self.num_in_flight):
            loss += self._fly(flight, seed)
            if not math.isfinite(loss):
                self.optimizer.discard()
                break
        return loss

    def _fly(self, flight: Flight, seed: int) -> float:
        """Forward and backward of one flight; its part of the loss. Backward is left out if that is not finite."""
        groups = self._groups(flight, seed, recording=True)
        self._forward(groups)
        self.optimizer.wait()
        for layer, counts_E in self._counts_LE.items():
            _add_counts(self.counts.counts_LE, layer, counts_E)
        loss = self._loss(groups)
        if math.isfinite(loss):
            self.optimizer.begin_backward(is_last=flight.is_last)
            self._expect_gradients(groups)
            self.dense.begin_backward(is_first=flight.is_first, is_last=flight.is_last)
            self.policy.begin_backward(self._counts_LE, is_last=flight.is_last)
            self._entered = set()
            self._left = dict.fromkeys(range(self.model.spec.num_layers), len(groups))
            self._backward(groups)
            self.resources.deferred.run_all()
            if self.dense.of_layer(OUTER_LAYER):
                self.optimizer.expect(self.dense.that_leave(OUTER_LAYER))
                self.dense.leave_backward(OUTER_LAYER)
        return loss

    def _backward(self, groups: list[Group]) -> None:
        self._in_turns([self._backward_of(group) for group in groups])

    @staticmethod
    def _in_turns(active: list[Iterator[None]]) -> None:
        """Each goes on when all others have: while one waits for its experts, the next computes."""
        over = object()
        while active:
            active = [backward for backward in active if next(backward, over) is not over]

    def _expect_gradients(self, groups: list[Group]) -> None:
        parts = Counter(
            UnitKey(layer, expert)
            for group in groups
            for layer, wave in group.waves.items()
            for expert, count in enumerate(wave.counts_E)
            if count
        )
        self.resources.gradients.expect(parts)
        self.optimizer.expect(parts)

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch]) -> float:
        """Mean loss over label tokens, without dropout, changing nothing."""
        self.counts = StepCounts()
        self.model.module.eval()
        try:
            groups = self._groups(Flight.whole(batches), 0, recording=False)
            self._forward(groups)
            self.optimizer.wait()
            return self._loss(groups)
        finally:
            self.model.module.train()


def _add_counts(counts_LE: dict[int, list[int]], layer: int, counts_E: list[int]) -> None:
    before = counts_LE.get(layer, [0] * len(counts_E))
    counts_LE[layer] = [a + b for a, b in zip(before, counts_E, strict=True)]
