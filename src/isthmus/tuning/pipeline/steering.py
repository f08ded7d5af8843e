"""Who decides what happens when a model's own forward code comes to a layer, or to a module with weights outside every
layer: a ``Walk``. And how such a part runs on ``meta``: no weights, no values, only what shapes come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.models.moe_model import MoeModel
from isthmus.spec.errors import IsthmusError

Forward = Callable[..., Any]


class Abandoned(BaseException):
    """Ends a model's forward where nothing that follows matters here. Not an ``Exception``: nobody is to handle it on
    the way."""


class Walk(Protocol):
    """One way of going through a model's forward."""

    def layer(self, number: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """What layer ``number`` returns for these arguments."""
        ...

    def outer(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """What a module with weights outside every layer returns."""
        ...

    def logits(self, layer: int, logits: Tensor) -> Tensor:
        """What the auxiliary loss sees of a router."""
        ...


class Steering:
    """Puts a model's parts under the control of ``walk``, for good. Mutates the instances only."""

    walk: Walk

    def __init__(self, model: MoeModel) -> None:
        self.model = model
        self.is_on_meta = False
        inside = {id(child) for layer in model.layers for child in layer.modules()}
        for number, layer in enumerate(model.layers):
            layer.forward = partial(self._layer, number, layer.forward)
        for module in list(model.module.modules()):
            if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
                module.forward = partial(self._outer, module, module.forward)
        model.wrap_routers(lambda layer, logits: self.walk.logits(layer, logits))

    def _layer(self, number: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.is_on_meta else self.walk.layer(number, forward, args, kwargs)

    def _outer(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.is_on_meta else self.walk.outer(module, forward, args, kwargs)

    @contextmanager
    def using(self, walk: Walk) -> Iterator[None]:
        before = getattr(self, "walk", walk)
        self.walk = walk
        try:
            yield
        finally:
            self.walk = before

    def on_meta(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """What ``module`` would return, on ``meta``. Its weights are not looked at; the same tensor given twice is the
        same tensor there. Raises ``IsthmusError`` for a module that needs values to say what shapes it returns."""
        known: dict[int, Tensor] = {}

        def there(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:
                known[id(value)] = torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
            return known[id(value)]

        state = {name: there(value) for name, value in (*module.named_parameters(), *module.named_buffers())}
        args, kwargs = pytree.tree_map(there, (args, kwargs))
        self.is_on_meta = True
        try:
            return torch.func.functional_call(module, state, args, kwargs)
        except RuntimeError as error:
            raise IsthmusError(
                f"model: {type(module).__name__} cannot be run without values ({str(error).partition('. ')[0]}), as "
                "processes that do not have it must; start one process."
            ) from error
        finally:
            self.is_on_meta = False

    def pass_router(self, layer: int, logits: Tensor) -> None:
        """Has the auxiliary loss read ``logits`` (see ``MoeParts.logits_index``) as those of a layer that does not run
        here."""
        parts = self.model.moe_parts[layer]
        before = parts.router.forward
        parts.router.forward = lambda: (*[None] * parts.logits_index, logits)
        try:
            parts.router()
        finally:
            parts.router.forward = before
