"""Walking a model and its decoupled copy through some text, layer by layer, with the hidden states of both at hand.

Layers are called as the model's own forward code calls its first one, so masks and positions are right whatever the
family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isthmus.models.decoupled.architectures import layers_of


class _FirstLayerReached(Exception):
    pass


@dataclass
class Call:
    """How a layer is called for one batch: its input ``hidden`` (B, T, H), what else it is given, and which of the
    tokens are no padding, (B, T) bool."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: Mapping[str, Any]
    is_token: Tensor

    def run(self, layer: nn.Module) -> Tensor:
        """The layer's output, (B, T, H)."""
        output = layer(self.hidden, *self.rest, **self.named)
        return output if isinstance(output, Tensor) else output[0]

    def rows(self, hidden: Tensor) -> Tensor:
        """Those of (B, T, …) that are no padding, (M, …)."""
        return hidden[self.is_token]


def calls_of(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[Call]:
    """How ``model`` calls its first layer for each of ``batches`` (``input_ids``, ``attention_mask``)."""
    calls: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        calls.append(Call(hidden.detach(), tuple(rest), kwargs, torch.empty(0)))
        raise _FirstLayerReached

    hook = layers_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model.base_model(**batch, use_cache=False)
            except _FirstLayerReached:
                calls[-1].is_token = batch["attention_mask"].bool()
    finally:
        hook.remove()
    return calls


class Spy:
    """Inputs and outputs of some modules, as they were in the last call."""

    def __init__(self, **modules: nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._hooks = [module.register_forward_hook(self._remember(name)) for name, module in modules.items()]

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.inputs[name] = args[0]
            self.outputs[name] = output

        return hook

    def __enter__(self) -> Spy:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
