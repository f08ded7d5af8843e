"""What crosses from one process to another in a forward pass: found by running the model's own code without weights.

A *border* lies before and after each layer. Which tensors cross it is what autograd says: everything that a layer or a
module with weights returns is marked as needing a gradient, and what is marked when it reaches a layer depends on
weights, so it must come from who computed it. Masks and rotary tables are not: every process makes its own. A second
run, with only those marks that training itself would make, says which of the tensors have gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from isthmus.models.moe_model import MoeModel
from isthmus.spec.errors import IsthmusError
from isthmus.training.random_state import random_state, restore_random_state
from isthmus.tuning.pipeline.links import Form
from isthmus.tuning.pipeline.steering import Abandoned, Forward, Steering


@dataclass(frozen=True)
class Passing:
    """A tensor at a border: its position among the leaves of arguments or of what is returned."""

    position: int
    form: Form
    is_differentiable: bool


@dataclass(frozen=True)
class LayerRoute:
    """One layer, seen from outside."""

    inputs: tuple[Passing, ...]
    """Arguments that depend on weights, each distinct tensor once."""
    outputs: tuple[Passing, ...]
    structure: Any
    """What it returns, with a ``Form`` in each tensor's place."""
    router_logits: Form | None
    follows_outer: bool
    """Whether a module with weights outside every layer runs between the layer before and this one."""


@dataclass(frozen=True)
class Route:
    """One kind of micro-batch on its way through all layers. ``outer``: what each call of a module with weights outside
    the layers returns, up to the last layer."""

    layers: tuple[LayerRoute, ...]
    outer: tuple[Any, ...]


def find_route(
    model: MoeModel, steering: Steering, inputs: dict[str, Tensor], arguments: dict[str, bool], device: torch.device
) -> Route:
    """The route of micro-batches like ``inputs``, which are on ``device``. Changes no random numbers.

    Raises ``IsthmusError`` for a model whose layers do not all run once, in order.
    """
    for name, value in model.module.config.to_dict().items():
        if name.endswith("layerdrop") and value:
            raise IsthmusError(
                f"{name}: got {value} in config.json, wanted 0: processes cannot skip layers together; start one."
            )
    found = []
    for marks_all in (True, False):
        survey = _Survey(model, steering, device, marks_all=marks_all)
        state = random_state(device)
        # Who counts what autograd saves in a pass counts none of this.
        with steering.using(survey), torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            with suppress(Abandoned):
                model.module(**inputs, **arguments)
        restore_random_state(device, state)
        if len(survey.layers) != len(model.layers):
            raise _not_in_order(len(survey.layers), len(model.layers))
        found.append(survey)
    marked, real = found
    layers = tuple(
        LayerRoute(
            inputs=_passings(marked_layer.inputs, real_layer.inputs),
            outputs=_passings(marked_layer.outputs, real_layer.outputs),
            structure=marked_layer.structure,
            router_logits=marked_layer.router_logits,
            follows_outer=marked_layer.follows_outer,
        )
        for marked_layer, real_layer in zip(marked.layers, real.layers, strict=True)
    )
    return Route(layers=layers, outer=tuple(marked.outer_structures))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _passings(marked: dict[int, Form], real: dict[int, Form]) -> tuple[Passing, ...]:
    return tuple(Passing(position, form, position in real) for position, form in marked.items())


def _not_in_order(found: int, wanted: int) -> IsthmusError:
    return IsthmusError(
        f"model: its forward came to layer {found} where another was due ({wanted} in all); wanted every layer "
        "once, in order; start one process."
    )


@dataclass
class _Seen:
    inputs: dict[int, Form]
    outputs: dict[int, Form]
    structure: Any
    router_logits: Form | None
    follows_outer: bool


class _Survey:
    """A walk on which nothing runs but what lies between the parts with weights."""

    def __init__(self, model: MoeModel, steering: Steering, device: torch.device, *, marks_all: bool) -> None:
        self.model, self.steering, self.device, self.marks_all = model, steering, device, marks_all
        self.layers: list[_Seen] = []
        self.outer_structures: list[Any] = []
        self._follows_outer = False
        self._logits: Form | None = None

    def layer(self, number: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        if number != len(self.layers):
            raise _not_in_order(number, len(self.model.layers))
        inputs = _distinct(pytree.tree_leaves((args, kwargs)))
        self._logits = None
        returned = self.steering.on_meta(self.model.layers[number], args, kwargs)
        structure = structure_of(returned)
        marked = [leaf if self._is_marked(leaf) else None for leaf in pytree.tree_leaves(returned)]
        self.layers.append(
            _Seen(inputs, _distinct(marked, any_will_do=True), structure, self._logits, self._follows_outer)
        )
        self._follows_outer = False
        if len(self.layers) == len(self.model.layers):
            raise Abandoned
        return self._ghosts(returned)

    def outer(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        self._follows_outer = True
        returned = self.steering.on_meta(module, args, kwargs)
        self.outer_structures.append(structure_of(returned))
        return self._ghosts(returned)

    def logits(self, layer: int, logits: Tensor) -> Tensor:
        self._logits = Form(tuple(logits.shape), logits.dtype)
        return logits

    def _is_marked(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and (self.marks_all or value.requires_grad)

    def _ghosts(self, returned: Any) -> Any:
        made: dict[int, Tensor] = {}

        def ghost(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in made:
                form = Form(tuple(value.shape), value.dtype)
                made[id(value)] = ghost_of(form, self.device).requires_grad_(self._is_marked(value))
            return made[id(value)]

        return pytree.tree_map(ghost, returned)


def _distinct(leaves: list[Any], *, any_will_do: bool = False) -> dict[int, Form]:
    """Position and form of every tensor that needs a gradient (or any), each once."""
    found: dict[int, Form] = {}
    seen: set[int] = set()
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (any_will_do or leaf.requires_grad) and id(leaf) not in seen:
            seen.add(id(leaf))
            found[position] = Form(tuple(leaf.shape), leaf.dtype)
    return found


def structure_of(returned: Any) -> Any:
    """``returned`` with a ``Form`` in each tensor's place. Raises ``IsthmusError`` where a tensor holds no fractions:
    such a one cannot be left out."""

    def form(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            raise IsthmusError(f"model: a layer returns a tensor of {value.dtype}; start one process.")
        return Form(tuple(value.shape), value.dtype)

    return pytree.tree_map(form, returned)


def fill_in(structure: Any, make: Callable[[Form], Tensor]) -> Any:
    """``structure`` with tensors in the places of its ``Form``s."""
    return pytree.tree_map(lambda value: make(value) if isinstance(value, Form) else value, structure)


def ghost_of(form: Form, device: torch.device) -> Tensor:
    """What stands for a tensor that is elsewhere: no memory, and not a number, so that nobody computes with it
    unnoticed."""
    return torch.full((), torch.nan, dtype=form.dtype, device=device).expand(form.shape)
