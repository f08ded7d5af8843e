"""One process's part of a model that several train: which layers are its own, and what the other processes' return."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.models.moe_model import MoeModel
from isthmus.planning.stages import Division
from isthmus.profiling.crowding import Interruption
from isthmus.profiling.dense import Forward
from isthmus.spec.plan import Stage
from isthmus.tuning.pipeline.links import Form, Links
from isthmus.tuning.pipeline.route import Route, fill_in, find_route
from isthmus.tuning.pipeline.steering import Abandoned, Steering
from isthmus.tuning.pipeline.steering import Forward as LayerForward
from isthmus.tuning.pipeline.wire import Wire
from isthmus.tuning.tape import Tape
from isthmus.tuning.taped import TapedLoss, no_taped_experts, run_taped_layer


class Pipeline:
    """Restricts ``model`` to this rank's stages and takes its forward over."""

    def __init__(self, model: MoeModel, links: Links, division: Division, wire: str | None = None) -> None:
        """``wire``: the codec by which hidden states and their gradients travel, None: as they are.

        Raises ``ValueError`` for a model whose layers share parameters.
        """
        self.model, self.links, self.rank = model, links, links.rank
        self.wire = Wire(wire, model.spec.hidden_size)
        self.division = division
        self.layers = self.division.layers_of(self.rank)
        model.restrict(self.layers, has_outer=self.rank == 0)
        self.arguments = model.forward_arguments()
        self.has_router_loss = "output_router_logits" in self.arguments
        self.steering = Steering(model)
        self._routes: dict[tuple, Route] = {}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """This rank's own, in the order they run."""
        return self.division.stages_of(self.rank)

    def route(self, inputs: dict[str, Tensor]) -> Route:
        """The route of micro-batches with tensors of the same shapes as ``inputs``, found once for each kind."""
        kind = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
        if kind not in self._routes:
            device = next(iter(inputs.values())).device
            self._routes[kind] = find_route(self.model, self.steering, inputs, self.arguments, device)
        return self._routes[kind]

    def runs_gap(self, route: Route, layer: int) -> int:
        """The rank that runs the code between the layer before and ``layer``: rank 0 where it uses weights outside the
        layers, else who has the layer before."""
        if layer in (0, len(route.layers)) or route.layers[layer].follows_outer:
            return 0
        return self.division.rank_of(layer - 1)

    def rehearse(self, model: MoeModel, inputs: dict[str, Tensor]) -> Tensor:
        """Runs this rank's parts alone, one after the other, without the other ranks: to be measured. Returns something
        whose backward goes through all of them."""
        walk = _Rehearsal(self, self.route(inputs), None)
        with self.steering.using(walk):
            try:
                return model.module(**inputs, **self.arguments).loss
            except Abandoned:
                leaves = pytree.tree_leaves(walk.last)
                return torch.stack(
                    [
                        leaf.sum(dtype=torch.float32)
                        for leaf in leaves
                        if isinstance(leaf, Tensor) and leaf.requires_grad
                    ]
                ).sum()

    def rehearse_taped(self, between: Interruption | None) -> Forward:
        """``rehearse`` with graphs cut where the engine cuts them. Experts are left out: ``between`` comes in their
        place, in both passes."""

        def run(model: MoeModel, inputs: dict[str, Tensor]) -> TapedLoss:
            tape = Tape(recording=True)
            walk = _Rehearsal(self, self.route(inputs), tape)
            model.set_experts_function(no_taped_experts(tape, between))
            with self.steering.using(walk), suppress(Abandoned):
                tape.loss = model.module(**inputs, **self.arguments).loss
            return TapedLoss(tape, between)

        return run


class _Rehearsal:
    """A walk on which other ranks' parts hand on what they are given, at almost no cost. ``tape`` None: its graph is
    not cut."""

    def __init__(self, pipeline: Pipeline, route: Route, tape: Tape | None) -> None:
        self.pipeline, self.route, self.tape = pipeline, route, tape
        self.last: Any = None
        self._num_outer = 0

    def layer(self, number: int, forward: LayerForward, args: tuple, kwargs: dict) -> Any:
        pipeline = self.pipeline
        if number in pipeline.layers:
            self.last = self._run(number, forward, args, kwargs)
            if pipeline.rank and number == pipeline.layers[-1]:
                raise Abandoned
            return self.last
        layer = self.route.layers[number]
        if layer.router_logits is not None and pipeline.has_router_loss and not pipeline.rank:
            form = layer.router_logits
            pipeline.steering.pass_router(
                number, torch.zeros(form.shape, dtype=form.dtype, device=_device(args, kwargs))
            )
        return _handed_on(layer.structure, args, kwargs)

    def _run(self, number: int, forward: LayerForward, args: tuple, kwargs: dict) -> Any:
        if self.tape is None:
            return forward(*args, **kwargs)
        return run_taped_layer(self.tape, number, forward, args, kwargs, _device(args, kwargs))

    def outer(self, module: nn.Module, forward: LayerForward, args: tuple, kwargs: dict) -> Any:
        if not self.pipeline.rank:
            return forward(*args, **kwargs)
        self._num_outer += 1
        return _handed_on(self.route.outer[self._num_outer - 1], args, kwargs)

    def logits(self, layer: int, logits: Tensor) -> Tensor:
        return logits if self.tape is None else self.tape.cut_router_logits(logits)


def _handed_on(structure: Any, args: tuple, kwargs: dict) -> Any:
    """``structure`` with the arguments of the same forms, else zeros."""
    given = {
        Form(tuple(leaf.shape), leaf.dtype): leaf
        for leaf in reversed(pytree.tree_leaves((args, kwargs)))
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    device = _device(args, kwargs)

    def make(form: Form) -> Tensor:
        leaf = given.get(form)
        if leaf is not None:
            return leaf.view_as(leaf)
        return torch.zeros(form.shape, dtype=form.dtype, device=device, requires_grad=True)

    return fill_in(structure, make)


def _device(args: tuple, kwargs: dict) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
