"""A training step of several processes: each runs the model's own forward code for every micro-batch, in greenlets as
one process does, but leaves out what is another rank's and exchanges what crosses the borders.

The order is the looped breadth-first one (APTMoE, section 4): a rank takes all micro-batches of a flight, one after
the other, through one of its stages before it goes on to its next; while one waits for its experts on the CPU, the next
computes. What need not wait goes on before the next is begun: another rank waits for it. Backward is the same in
reverse. Every rank follows this one order, in which whatever is waited for comes earlier, so nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.models.moe_model import on_device
from isthmus.profiling.dense import no_experts
from isthmus.tuning.dense import DenseUnits
from isthmus.tuning.engine import Engine, Group, Run
from isthmus.tuning.flight import Flight
from isthmus.tuning.forward_pass import ForwardPass
from isthmus.tuning.pipeline.links import FIRST_FREE_TAG, Arrival, Form
from isthmus.tuning.pipeline.pipeline import Pipeline
from isthmus.tuning.pipeline.route import Passing, Route, fill_in, ghost_of
from isthmus.tuning.pipeline.steering import Abandoned, Forward
from isthmus.tuning.pipeline.wire import form_of
from isthmus.tuning.protocols import Policy
from isthmus.tuning.step_optimizer import StepOptimizer
from isthmus.tuning.tape import ExpertsCall, Received, Sent
from isthmus.tuning.wave import Resources

_INPUTS, _OUTPUTS, _ROUTER, _NUM_KINDS = 0, 1, 2, 3


@dataclass(slots=True)
class Journey(Run):
    """A micro-batch on its way through this rank's part of the model."""

    number: int = 0
    route: Route = field(default_factory=lambda: Route(layers=(), outer=()))
    arrival: Arrival | None = None
    """What it waits for."""
    gradients: dict[int, Arrival] = field(default_factory=dict)
    """In backward: what comes back, by border."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """Router logits by layer: on rank 0 where the auxiliary loss will read those of layers that are not here, elsewhere
    those that rank 0 is to get."""
    num_outer: int = 0


class PipelineEngine(Engine):
    """``Engine`` for one of several ranks. The micro-batches of a pass must be the same on all."""

    def __init__(
        self,
        pipeline: Pipeline,
        resources: Resources,
        dense: DenseUnits,
        policy: Policy,
        optimizer: StepOptimizer,
        num_in_flight: int,
    ) -> None:
        self.pipeline, self.links, self.rank = pipeline, pipeline.links, pipeline.rank
        super().__init__(pipeline.model, resources, dense, policy, optimizer, num_in_flight)
        self._device = resources.accelerator.device

    def _install(self) -> None:
        self.model.set_experts_function(self._experts)
        self.pipeline.steering.walk = self

    # --- messages ----------------------------------------------------------------------------------------------------

    def _tag(self, run: Journey, border: int, *, is_gradient: bool) -> int:
        number = run.number * _NUM_KINDS * self.model.spec.num_layers + border
        return FIRST_FREE_TAG + 2 * number + is_gradient

    def _send(self, run: Journey, leaves: list[Any], passings: Sequence[Passing], to: int, border: int) -> None:
        values = [leaves[passing.position] for passing in passings]
        flags = [passing.is_differentiable for passing in passings]
        for value, passing in zip(values, passings, strict=True):
            if form_of(value) != passing.form:
                raise RuntimeError(f"{_name(run, border)}: got {value.shape} {value.dtype}, wanted {passing.form}")
        leaving = run.tape.send(values, to=to, number=border, are_differentiable=flags)
        self._set_off(leaving, to, self._tag(run, border, is_gradient=False), _name(run, border))

    def _set_off(self, values: list[Tensor], to: int, tag: int, name: str) -> None:
        self.links.send([self.pipeline.wire.pack(value) for value in values], to, tag, name)

    def _await(
        self, run: Journey, forms: Sequence[Form], source: int, border: int, *, is_gradient: bool = False
    ) -> Arrival:
        name = f"gradients of {_name(run, border)}" if is_gradient else _name(run, border)
        messages = [self.pipeline.wire.message(form) for form in forms]
        return self.links.receive(messages, source, self._tag(run, border, is_gradient=is_gradient), name)

    def _arrived(self, messages: Sequence[Tensor], forms: Sequence[Form]) -> list[Tensor]:
        wire = self.pipeline.wire
        return [wire.unpack(message, form).to(self._device) for message, form in zip(messages, forms, strict=True)]

    def _receive(self, run: Journey, passings: Sequence[Passing], source: int, border: int) -> list[Tensor]:
        """Inside a micro-batch's greenlet: lets the others go on until the tensors are here."""
        assert self._hub is not None
        forms = [passing.form for passing in passings]
        values = self._arrived(self._hub.switch(self._await(run, forms, source, border)), forms)
        are_differentiable = [passing.is_differentiable for passing in passings]
        run.tape.receive(values, source=source, number=border, are_differentiable=are_differentiable)
        return values

    # --- the walk (see ``Walk``) -------------------------------------------------------------------------------------

    def layer(self, number: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        run, pipeline = self._journey, self.pipeline
        here = run.route.layers[number]
        owner = pipeline.division.rank_of(number)
        before, after = (pipeline.runs_gap(run.route, layer) for layer in (number, number + 1))
        leaves = pytree.tree_leaves((args, kwargs))
        if before == self.rank != owner:
            self._send(run, leaves, here.inputs, owner, _border(number, _INPUTS))
        if self.rank and number > pipeline.layers[-1]:
            raise Abandoned
        if owner != self.rank:
            returned = self._leave_out(run, number)
        else:
            if before != self.rank:
                run.dense_layer = number
                values = self._receive(run, here.inputs, before, _border(number, _INPUTS))
                for passing, value in zip(here.inputs, values, strict=True):
                    run.tape.stand_in(leaves[passing.position], value)
            returned = self._run_layer(number, forward, args, kwargs)
            self._send_what_others_read(run, number, returned, after)
        if number + 1 == len(run.route.layers):
            if self.rank:
                raise Abandoned
            self._collect_logits(run)
        self._seed(run, 2 * number + 2)
        return returned

    def outer(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        if not self.rank:
            return forward(*args, **kwargs)
        run = self._journey
        run.num_outer += 1
        return self._ghosts(run.route.outer[run.num_outer - 1])

    def logits(self, layer: int, logits: Tensor) -> Tensor:
        if layer not in self.pipeline.layers:
            return logits
        return self._router_logits(layer, logits)

    @property
    def _journey(self) -> Journey:
        assert isinstance(self._run, Journey), "the model runs only inside the engine"
        return self._run

    def _experts(self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if hidden.is_meta:
            return no_experts(layer, module, hidden, index, weights)
        if layer + 1 not in self.pipeline.layers:
            self._journey.dense_layer = layer  # the next one is not here
        return super()._experts(layer, module, hidden, index, weights)

    def _ghosts(self, structure: Any) -> Any:
        return fill_in(structure, lambda form: ghost_of(form, self._device))

    def _leave_out(self, run: Journey, number: int) -> Any:
        """What a layer of another rank returns here: ghosts, or on rank 0, where the gap behind it needs them, what
        has been sent."""
        here, owner = run.route.layers[number], self.pipeline.division.rank_of(number)
        if self.rank:
            return self._ghosts(here.structure)
        if here.router_logits is not None and self.pipeline.has_router_loss:
            form = here.router_logits
            run.logits[number] = torch.empty(form.shape, dtype=form.dtype, device=self._device)
            self.pipeline.steering.pass_router(number, run.logits[number])
        returned = self._ghosts(here.structure)
        if self.pipeline.runs_gap(run.route, number + 1) == 0:
            values = self._receive(run, here.outputs, owner, _border(number, _OUTPUTS))
            leaves, structure = pytree.tree_flatten(returned)
            for passing, value in zip(here.outputs, values, strict=True):
                leaves[passing.position] = value
            returned = pytree.tree_unflatten(leaves, structure)
        return returned

    def _send_what_others_read(self, run: Journey, number: int, returned: Any, after: int) -> None:
        """What rank 0 reads of a layer of ours: its outputs, if the gap behind it is rank 0's, and behind our last one
        the router logits of all, in one message: nobody reads them before the model's end."""
        here = run.route.layers[number]
        if not self.rank:
            return
        if after == 0:
            self._send(run, pytree.tree_leaves(returned), here.outputs, 0, _border(number, _OUTPUTS))
        if number == self.pipeline.layers[-1] and run.logits:
            self._send(run, list(run.logits.values()), self._logits_of(run, run.logits), 0, _border(number, _ROUTER))

    def _router_logits(self, layer: int, logits: Tensor) -> Tensor:
        cut = super()._router_logits(layer, logits)
        if self.rank and self.pipeline.has_router_loss:
            self._journey.logits[layer] = cut
        return cut

    def _collect_logits(self, run: Journey) -> None:
        """Before the last gap rank 0 gets all router logits there are; the auxiliary loss has their places already."""
        division = self.pipeline.division
        for source in range(1, self.links.size):
            own = division.layers_of(source)
            layers, border = [layer for layer in own if layer in run.logits], _border(own[-1], _ROUTER)
            if not layers:
                continue
            forms = [passing.form for passing in self._logits_of(run, layers)]
            values = self._arrived(self._await(run, forms, source, border).wait(), forms)
            for layer, value in zip(layers, values, strict=True):
                run.logits[layer].copy_(value)
            places = [run.logits[layer] for layer in layers]
            run.tape.receive(places, source=source, number=border, are_differentiable=[True] * len(places))

    @staticmethod
    def _logits_of(run: Journey, layers: Iterable[int]) -> list[Passing]:
        forms = [run.route.layers[layer].router_logits for layer in layers]
        return [Passing(at, form, is_differentiable=True) for at, form in enumerate(forms) if form is not None]

    # --- forward -----------------------------------------------------------------------------------------------------

    def _groups(self, flight: Flight, seed: int, *, recording: bool) -> list[Group]:
        """Every micro-batch by itself."""
        journeys = [
            Journey(
                batch=run.batch,
                weight=run.weight,
                tape=run.tape,
                seed=run.seed,
                dense_layer=self.pipeline.layers[0],
                number=number,
                route=self.pipeline.route(on_device(run.batch.inputs, self._device)),
            )
            for number, run in enumerate(self._runs(flight, seed, recording=recording), start=flight.first)
        ]
        return [Group(runs=[journey]) for journey in journeys]

    def _start(self, run: Run) -> None:
        with suppress(Abandoned):
            super()._start(run)

    def _forward(self, groups: list[Group]) -> None:
        self._begin_forward(groups)
        while groups:
            groups = self._forward_part(groups)

    def _forward_part(self, groups: list[Group]) -> list[Group]:
        """Takes all micro-batches to where they wait for another rank next; returns those that are not at their end."""
        active, waiting = list(groups), []
        while active:
            group = self._going_on(active)
            run = _journey_of(group)
            output: object = None
            if isinstance(group.waiting, ForwardPass):
                (output,) = group.waiting.finish()
                group.waiting = None
            elif run.arrival is not None:
                output = self._wait(run)
            event: Any = self._resume(run, output)
            if isinstance(event, ExpertsCall):
                self._start_wave(group, [event])
                continue
            active.remove(group)
            if isinstance(event, Arrival):
                run.arrival = event
                waiting.append(group)
        return waiting

    @staticmethod
    def _going_on(active: list[Group]) -> Group:
        """The first that need not wait: what another rank waits for so leaves before the next is begun. Where all
        wait, the first that does so for experts of ours, else the first."""
        ready = (group for group in active if _is_ready(group))
        ours = (group for group in active if group.waiting is not None)
        return next(ready, None) or next(ours, active[0])

    def _wait(self, run: Journey) -> list[Tensor]:
        arrival, run.arrival = run.arrival, None
        assert arrival is not None
        with self.resources.accelerator.recorder.span("accelerator", arrival.what, kind="wait"):
            return arrival.wait()

    def _loss(self, groups: list[Group]) -> float:
        """Rank 0's, told to all."""
        loss = super()._loss(groups) if not self.rank else 0.0
        self.links.flush()
        return float.fromhex(self.links.from_first(loss.hex(), "the loss"))

    # --- backward ----------------------------------------------------------------------------------------------------

    def _backward(self, groups: list[Group]) -> None:
        for group in groups:
            self._await_gradients(_journey_of(group))
        while groups:
            parts = {id(group): self._backward_part(group) for group in groups}
            active, over = list(groups), object()
            while active:
                group = self._going_on(active)
                if next(parts[id(group)], over) is over:
                    active.remove(group)
            groups = [group for group in groups if group.runs[0].tape.segments]
        self.links.flush()

    def _backward_part(self, group: Group) -> Iterator[None]:
        """Backward of one micro-batch to where its gradients go to another rank."""
        run = _journey_of(group)
        if run.tape.loss is not None:
            with self.resources.accelerator.compute("head backward", kind="dense"):
                run.tape.backward_loss(run.weight)
        while run.tape.segments:
            segment = run.tape.segments.pop()
            if isinstance(segment, Received):
                border, tag = segment.number, self._tag(run, segment.number, is_gradient=True)
                self._set_off(segment.gradients(), segment.source, tag, f"gradients of {_name(run, border)}")
                if border % _NUM_KINDS != _ROUTER:
                    return
            elif isinstance(segment, Sent):
                run.arrival = run.gradients.pop(segment.number)
                yield
                gradients = self._arrived(self._wait(run), [form_of(leaf) for leaf in segment.leaves])
                with self.resources.accelerator.compute("gap backward", kind="dense"):
                    segment.finish(gradients)
            else:
                yield from self._backward_layer(group, [segment])

    def _await_gradients(self, run: Journey) -> None:
        """From here on there is memory for all that will come back."""
        for sent in reversed(run.tape.segments):
            if isinstance(sent, Sent):
                forms = [form_of(leaf) for leaf in sent.leaves]
                run.gradients[sent.number] = self._await(run, forms, sent.to, sent.number, is_gradient=True)


def _journey_of(group: Group) -> Journey:
    (run,) = group.runs
    assert isinstance(run, Journey)
    return run


def _is_ready(group: Group) -> bool:
    """Whether it can go on without waiting."""
    arrival = _journey_of(group).arrival
    if arrival is not None:
        return arrival.is_here()
    return group.waiting is None or group.waiting.is_ready()


def _border(layer: int, kind: int) -> int:
    return _NUM_KINDS * layer + kind


def _name(run: Journey, border: int) -> str:
    layer, kind = divmod(border, _NUM_KINDS)
    return f"the {('inputs', 'outputs', 'router logits')[kind]} of layer {layer}, micro-batch {run.number + 1}"
