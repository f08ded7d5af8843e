"""The bookkeeping of names: which unit, and which tensor in it, each parameter of a Hugging Face module belongs to.

Three kinds of names appear in this package:

- *module names*: what ``module.named_parameters()`` says, e.g. ``model.layers.0.mlp.experts.gate_up_proj``;
- *unit names*: a ``UnitKey`` and a tensor name in its layout. Dense units use module names, expert units the uniform
  names of ``ExpertSpec`` (``gate_up_proj``, ``down_proj``, …);
- *checkpoint names*: what is in the files (``checkpoint_keys.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from isthmus.models.families import LISTED_EXPERTS, MoeParts
from isthmus.models.skeleton import fp32_router_parameters, is_kept_in_fp32
from isthmus.spec.model import DENSE, DENSE_FP32, OUTER_LAYER, TensorSpec, UnitKey, UnitLayout


def expert_names(parts: MoeParts) -> dict[str, tuple[int | None, str]]:
    """Module name -> (expert, uniform name) of one layer's routed experts. The expert is ``None`` for a fused
    parameter, whose first dimension counts the experts."""
    listed = LISTED_EXPERTS.get(type(parts.experts))
    if listed is None:
        return {f"{parts.experts_path}.{tensor.name}": (None, tensor.name) for tensor in parts.spec.tensors}
    return {
        f"{parts.experts_path}.expert_{expert}.{name}": (expert, uniform)
        for expert in range(parts.spec.num_experts)
        for name, uniform in listed.names.items()
    }


def unit_layouts(
    module: PreTrainedModel, layer_names: tuple[str, ...], moe_parts: Mapping[int, MoeParts], dtype: str
) -> dict[UnitKey, UnitLayout]:
    """The layout of every unit, in execution order with ``OUTER_LAYER`` first. Each parameter is in exactly one unit,
    tied ones once, under the first of their names; those that several layers share lie outside every layer."""
    expert_parameter_names = {name for parts in moe_parts.values() for name in expert_names(parts)}
    fp32_parameters = fp32_router_parameters(module) if dtype == "bf16" else set()
    layers_of: dict[nn.Parameter, set[int]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layers_of.setdefault(parameter, set()).add(layer_of(name, layer_names))
    dense: dict[UnitKey, list[TensorSpec]] = {}
    for name, parameter in module.named_parameters():
        if name in expert_parameter_names:
            continue
        is_fp32 = dtype == "bf16" and (parameter in fp32_parameters or is_kept_in_fp32(module, name))
        layer = min(layers_of[parameter]) if len(layers_of[parameter]) == 1 else OUTER_LAYER
        key = UnitKey(layer, DENSE_FP32 if is_fp32 else DENSE)
        dense.setdefault(key, []).append(TensorSpec(name=name, shape=tuple(parameter.shape)))

    layouts: dict[UnitKey, UnitLayout] = {}
    for layer in (OUTER_LAYER, *range(len(layer_names))):
        for expert, unit_dtype in ((DENSE, dtype), (DENSE_FP32, "fp32")):
            key = UnitKey(layer, expert)
            if key in dense:
                layouts[key] = UnitLayout(tensors=tuple(dense[key]), dtype=unit_dtype)
        if layer in moe_parts:
            spec = moe_parts[layer].spec
            layout = UnitLayout(tensors=spec.tensors, dtype=dtype)
            layouts |= {UnitKey(layer, expert): layout for expert in range(spec.num_experts)}
    return layouts


def layer_of(name: str, layer_names: tuple[str, ...]) -> int:
    """Number of the layer that a module name lies in, ``OUTER_LAYER`` if in none."""
    for layer, layer_name in enumerate(layer_names):
        if name.startswith(f"{layer_name}."):
            return layer
    return OUTER_LAYER


def owners_by_name(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """First name of each parameter -> every place (module, attribute) that holds it; more than one if it is tied."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, child in module.named_modules():
        for attribute, parameter in child.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((child, attribute))
            names.setdefault(parameter, f"{prefix}.{attribute}" if prefix else attribute)
    return {names[parameter]: owners for parameter, owners in places.items()}
