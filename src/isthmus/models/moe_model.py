"""``MoeModel``: a Hugging Face MoE model as units that an outside store holds.

The module starts with every parameter on ``meta``. Dense units are bound to memory with ``bind``; the routed experts'
parameters stay on ``meta`` for good, and a function (``set_experts_function``) computes them from wherever they are.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from isthmus.models.adapters import (
    EXPERTS_IMPLEMENTATION,
    adapt_experts,
    bias_logits,
    replace_logits,
    set_experts_call,
)
from isthmus.models.families import SUPPORTED, MoeParts, find_layers, find_moe_parts
from isthmus.models.layouts import owners_by_name, unit_layouts
from isthmus.models.skeleton import build_skeleton, torch_dtype
from isthmus.spec.model import DENSE, DENSE_FP32, OUTER_LAYER, ModelSpec, UnitKey, UnitLayout

ExpertsFunction = Callable[[int, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, experts module, hidden_TH, top_k_index_Tk int64, top_k_weights_Tk) -> out_TH. An index equal to the number of
experts means "no expert": the token was dropped, and its weight counts as zero."""


class MoeModel:
    """See the module's docstring. Build one with ``MoeModel.build``.

    ``layers``, ``experts`` and ``routers`` are parts of ``module``, the latter two by layer number. ``layouts`` has
    every unit: each routed expert, and ``DENSE`` (and ``DENSE_FP32``) of each layer and of ``OUTER_LAYER``. A process
    that has a part of the model only (``restrict``) says so in ``spec`` and ``held_layouts``; all else stays whole.
    """

    module: PreTrainedModel
    spec: ModelSpec
    whole_spec: ModelSpec
    dtype: str
    layer_names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    moe_parts: dict[int, MoeParts]
    experts: dict[int, nn.Module]
    routers: dict[int, nn.Module]
    layouts: dict[UnitKey, UnitLayout]
    held_layouts: dict[UnitKey, UnitLayout]

    def __init__(self, module: PreTrainedModel, dtype: str) -> None:
        layers = find_layers(module)
        self.module = module
        self.dtype = dtype
        self.layer_names = tuple(layers)
        self.layers = tuple(layers.values())
        found = {number: find_moe_parts(module, *item) for number, item in enumerate(layers.items())}
        self.moe_parts = {number: parts for number, parts in found.items() if parts is not None}
        if not self.moe_parts:
            raise ValueError(
                f"model: {type(module).__name__} ({module.config.model_type!r}) has no routed experts in "
                f"its {len(layers)} layers; wanted a Mixture-of-Experts model: {SUPPORTED}"
            )
        self.experts = {number: parts.experts for number, parts in self.moe_parts.items()}
        self.routers = {number: parts.router for number, parts in self.moe_parts.items()}
        self.layouts = unit_layouts(module, self.layer_names, self.moe_parts, dtype)
        self.held_layouts = self.layouts
        self.spec = self.whole_spec = self._make_spec()
        self._owners = owners_by_name(module)
        self._bound: dict[str, nn.Parameter] = {}
        self._logits_hooks: list[torch.utils.hooks.RemovableHandle] = []

    @classmethod
    def build(cls, config: PretrainedConfig, dtype: str) -> MoeModel:
        """The model that ``config`` describes (left as it is), in ``dtype`` ``fp32`` or ``bf16``; no weights are
        read or allocated.

        Raises ``ValueError`` for a model without routed experts, or with some that cannot be placed. Warns where the
        family has dropout inside an expert, which is not applied.
        """
        model = cls(build_skeleton(config, dtype), dtype)
        model.module.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        for experts in model.experts.values():
            adapt_experts(experts)
        model._warn_of_expert_dropout()
        return model

    def restrict(self, layers: Collection[int], *, has_outer: bool) -> None:
        """From here on only these layers, and with ``has_outer`` what lies outside every layer, are this process's.

        Raises ``ValueError`` where layers share parameters: those have no one place.
        """
        named = zip(self.layer_names, self.layers, strict=True)
        inside = {id(child): name for name, layer in named for child in layer.modules()}
        for name, owners in self._owners.items():
            layers_with_it = sorted({inside[id(owner)] for owner, _ in owners if id(owner) in inside})
            if len(layers_with_it) > 1 or (layers_with_it and any(id(owner) not in inside for owner, _ in owners)):
                raise ValueError(
                    f"model: {name} of {self.spec.model_type!r} belongs to {layers_with_it[0]} and to other parts; "
                    "wanted layers that share no parameters: start one process."
                )
        self.spec = self.spec.part(layers, has_outer=has_outer)
        held = {*layers, OUTER_LAYER} if has_outer else set(layers)
        self.held_layouts = {key: layout for key, layout in self.layouts.items() if key.layer in held}

    @property
    def slot_numel(self) -> int:
        """Parameters of the largest routed expert; 0 where there is none."""
        return max((self.layouts[UnitKey(layer, 0)].numel for layer in self.spec.moe_layers), default=0)

    def bind(self, key: UnitKey, flat: torch.Tensor) -> None:
        """Makes the parameters of dense unit ``key`` views of ``flat`` (one-dimensional, the layout's numel and
        dtype, any device).

        The first call puts ``nn.Parameter`` objects with ``requires_grad`` in place; later calls only repoint their
        ``.data``. Raises ``ValueError`` for an expert's unit or a ``flat`` that does not fit.
        """
        layout = self._dense_layout(key)
        wanted = torch_dtype(layout.dtype)
        if flat.shape != (layout.numel,) or flat.dtype != wanted:
            raise ValueError(
                f"flat: got {tuple(flat.shape)} {flat.dtype} for unit {key}, wanted ({layout.numel},) {wanted}"
            )
        # Not detach(): that shares the version counter, and a copy into ``flat`` between forward and backward (which
        # brings the same weights back) would look like a change of what autograd saved.
        for name, view in unit_views(layout, flat.data).items():
            if name in self._bound:
                self._bound[name].data = view
                continue
            parameter = nn.Parameter(view, requires_grad=True)
            self._bound[name] = parameter
            for owner, attribute in self._owners[name]:
                setattr(owner, attribute, parameter)

    def parameters_of(self, key: UnitKey) -> dict[str, nn.Parameter]:
        """The parameters of a bound dense unit by their names in its layout. Raises ``ValueError`` for any other."""
        names = [tensor.name for tensor in self._dense_layout(key).tensors]
        if names[0] not in self._bound:
            raise ValueError(f"key: {key} is not bound; call MoeModel.bind first")
        return {name: self._bound[name] for name in names}

    def move_buffers(self, device: torch.device) -> None:
        """Brings what is not a parameter (rotary frequencies, routers' corrections) to ``device``."""
        for submodule in self.module.modules():
            for name, buffer in submodule.named_buffers(recurse=False):
                setattr(submodule, name, buffer.to(device))

    def set_experts_function(self, function: ExpertsFunction) -> None:
        """From now on ``function`` computes the routed experts of every layer (see ``ExpertsFunction``)."""
        for layer, experts in self.experts.items():
            set_experts_call(experts, partial(function, layer, experts))

    def wrap_routers(self, function: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """Everything after the routers (the auxiliary loss) sees ``function(layer, logits)`` in place of their logits,
        whose shape is (T, E), or (batch, sequence, E) for Switch. The routing does not change. Replaces an earlier
        function."""
        for hook in self._logits_hooks:
            hook.remove()
        self._logits_hooks = [
            replace_logits(parts.router, parts.logits_index, partial(function, layer))
            for layer, parts in self.moe_parts.items()
        ]

    def add_router_bias(self, layer: int, bias_E: torch.Tensor) -> None:
        """Adds a constant to the logits of layer ``layer``'s router before it chooses experts, in every later forward.

        This changes the routing, its weights and the logits that the auxiliary loss sees. Replaces an earlier bias.
        Raises ``ValueError`` for a dense layer or a wrong shape.
        """
        if layer not in self.moe_parts:
            raise ValueError(f"layer: got {layer}, wanted one with routed experts: {sorted(self.moe_parts)}")
        num_experts = self.moe_parts[layer].spec.num_experts
        if bias_E.shape != (num_experts,):
            raise ValueError(f"bias_E: got shape {tuple(bias_E.shape)} for layer {layer}, wanted ({num_experts},)")
        bias_logits(self.routers[layer], bias_E)

    def forward_arguments(self) -> dict[str, bool]:
        """Keyword arguments for every training forward: no cache, and the router's auxiliary loss wherever the family
        defines one with a positive coefficient."""
        config = self.module.config
        coefficients = (getattr(config, name, None) or 0.0 for name in ("router_aux_loss_coef", "router_z_loss_coef"))
        has_loss = "output_router_logits" in inspect.signature(self.module.forward).parameters
        arguments = {"use_cache": False}
        return (
            arguments | {"output_router_logits": True} if has_loss and any(c > 0 for c in coefficients) else arguments
        )

    def _dense_layout(self, key: UnitKey) -> UnitLayout:
        if key.is_expert or key not in self.layouts:
            raise ValueError(f"key: got {key}, wanted a unit of this model that is not a routed expert")
        return self.layouts[key]

    def _dense_numel(self, layer: int) -> int:
        keys = (UnitKey(layer, DENSE), UnitKey(layer, DENSE_FP32))
        return sum(self.layouts[key].numel for key in keys if key in self.layouts)

    def _make_spec(self) -> ModelSpec:
        config = self.module.config
        layers = range(len(self.layers))
        return ModelSpec(
            model_type=config.model_type,
            architecture=type(self.module).__name__,
            is_encoder_decoder=bool(config.is_encoder_decoder),
            num_layers=len(self.layers),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            layers=tuple(self.moe_parts[layer].spec if layer in self.moe_parts else None for layer in layers),
            dense_numel=tuple(self._dense_numel(layer) for layer in layers),
            outer_numel=self._dense_numel(OUTER_LAYER),
        )

    def _warn_of_expert_dropout(self) -> None:
        rates = {
            child.p
            for experts in self.experts.values()
            for name, child in experts.named_modules()
            if isinstance(child, nn.Dropout) and name.endswith(".dropout") and child.p > 0
        }
        if rates:
            warnings.warn(
                f"model: {self.spec.model_type} drops out {max(rates):g} of the activations inside each routed expert "
                "while training; isthmus does not. Set its dropout to 0 in config.json to train every part alike.",
                stacklevel=3,
            )


def unit_views(layout: UnitLayout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a unit as views of its contiguous range ``flat``, shape (layout.numel,)."""
    pieces = flat.split([tensor.numel for tensor in layout.tensors])
    return {tensor.name: piece.view(tensor.shape) for tensor, piece in zip(layout.tensors, pieces, strict=True)}


def bound_parameters(model: MoeModel) -> Iterator[nn.Parameter]:
    """The parameters that have memory, in no particular order."""
    return (parameter for parameter in model.module.parameters() if not parameter.is_meta)


def on_device(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch's tensors on ``device``; the very same ones where they are there already."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
