"""What is where inside a Hugging Face MoE model: its layers in execution order, their routed experts and routers.

Works on a module whose parameters are on ``meta``. Two ways of keeping routed experts exist in transformers:

- *fused*: one parameter of shape (E, …) per projection, in a module that transformers' ``ExpertsInterface`` dispatches
  (Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek, gpt-oss and some sixty others);
- *listed*: a ``ModuleDict`` with one small MLP per expert (Switch, NLLB-MoE), see ``LISTED_EXPERTS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.integrations.moe import _default_apply_gate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts
from transformers.utils.output_capturing import OutputRecorder

from isthmus.spec.model import ExpertSpec, TensorSpec

SUPPORTED = "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2, DeepSeek-V3, gpt-oss, Switch, NLLB-MoE"
"""Families that are tested; others that use transformers' ``ExpertsInterface`` work as long as nothing below refuses
them."""

FUSED_NAMES = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")

GPT_OSS_ALPHA, GPT_OSS_LIMIT = 1.702, 7.0


@dataclass(frozen=True, kw_only=True)
class ListedExperts:
    """How one expert of a ``ModuleDict`` names its parameters, in the order of the uniform layout."""

    names: dict[str, str]
    """Name inside the expert's module -> uniform name."""
    top_k: int


LISTED_EXPERTS: dict[type[nn.Module], ListedExperts] = {
    SwitchTransformersExperts: ListedExperts(names={"wi.weight": "up_proj", "wo.weight": "down_proj"}, top_k=1),
    NllbMoeExperts: ListedExperts(
        names={
            "fc1.weight": "up_proj",
            "fc1.bias": "up_proj_bias",
            "fc2.weight": "down_proj",
            "fc2.bias": "down_proj_bias",
        },
        top_k=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class MoeParts:
    """The routed part of one layer. ``experts_path`` is the experts module's full name; ``logits_index`` is the
    position of the logits in what the router returns."""

    experts_path: str
    experts: nn.Module
    router: nn.Module
    logits_index: int
    spec: ExpertSpec


def find_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The Transformer layers by full name, in execution order (an encoder is registered before its decoder)."""
    layers: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        is_nested = any(name.startswith(f"{outer}.") for outer in layers)
        if isinstance(child, GradientCheckpointingLayer) and not is_nested:
            layers[name] = child
    return layers


def is_fused_experts(module: nn.Module) -> bool:
    """Whether transformers' ``ExpertsInterface`` dispatches this module (its decorator leaves these marks)."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def find_moe_parts(model: PreTrainedModel, layer_name: str, layer: nn.Module) -> MoeParts | None:
    """The routed experts and the router of ``layer``, ``None`` for a dense layer.

    Raises ``ValueError`` where the layer holds experts that cannot be treated as units.
    """
    found = [
        (name, child)
        for name, child in layer.named_modules(prefix=layer_name)
        if is_fused_experts(child) or type(child) in LISTED_EXPERTS
    ]
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(f"model: {layer_name} has {len(found)} groups of routed experts ({names}), wanted one")
    path, experts = found[0]
    router, logits_index = _find_router(model, layer_name, layer, path)
    return MoeParts(
        experts_path=path,
        experts=experts,
        router=router,
        logits_index=logits_index,
        spec=_expert_spec(path, experts, router, model.config),
    )


def _router_recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    """What transformers records as ``router_logits`` for the auxiliary loss: it names the router's class."""
    recorders = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            entry = (module._can_record_outputs or {}).get("router_logits")
            recorders += entry if isinstance(entry, list) else [entry]
    return [recorder for recorder in recorders if isinstance(recorder, OutputRecorder) and recorder.target_class]


def _find_router(model: PreTrainedModel, layer_name: str, layer: nn.Module, path: str) -> tuple[nn.Module, int]:
    recorders = _router_recorders(model)
    for name, child in layer.named_modules(prefix=layer_name):
        for recorder in recorders:
            in_layer = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f"{name}."
            if isinstance(child, recorder.target_class) and in_layer:
                return child, recorder.index
    block = model.get_submodule(path.rpartition(".")[0])
    for name in ("gate", "router"):
        if isinstance(router := getattr(block, name, None), nn.Module):
            return router, 0
    raise ValueError(f"model: found no router beside {path} of {type(model).__name__}; supported: {SUPPORTED}")


def _expert_spec(path: str, experts: Any, router: nn.Module, config: Any) -> ExpertSpec:
    listed = LISTED_EXPERTS.get(type(experts))
    if listed is not None:
        shapes = {uniform: _shape(experts, f"expert_0.{name}") for name, uniform in listed.names.items()}
        num_experts = int(experts.num_experts)  # not len(): NLLB-MoE keeps its dropout in the same ModuleDict
        top_k, is_transposed = min(listed.top_k, num_experts), False
    else:
        shapes = _fused_shapes(path, experts)
        num_experts = experts.get_parameter("down_proj").shape[0]
        top_k, is_transposed = _top_k(path, router, config), bool(experts.is_transposed)
    hidden_size, intermediate_size = shapes["down_proj"][::-1] if is_transposed else shapes["down_proj"]
    return ExpertSpec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        has_gate="gate_up_proj" in shapes,
        has_bias="down_proj_bias" in shapes,
        is_transposed=is_transposed,
        activation=expert_activation(experts),
        tensors=tuple(TensorSpec(name=name, shape=shape) for name, shape in shapes.items()),
    )


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(module.get_parameter(name).shape)


def _fused_shapes(path: str, experts: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of ONE expert's tensors, in the uniform order."""
    names = {name for name, _ in experts.named_parameters()}
    unknown = names - set(FUSED_NAMES)
    if unknown or getattr(experts, "has_post_expert_norm", False):
        extra = ", ".join(sorted(unknown)) or "a norm after each expert"
        raise ValueError(
            f"model: {path} ({type(experts).__name__}) has {extra}, which isthmus cannot place; supported: {SUPPORTED}"
        )
    return {name: _shape(experts, name)[1:] for name in FUSED_NAMES if name in names}


def _top_k(path: str, router: nn.Module, config: Any) -> int:
    for owner, name in ((router, "top_k"), (config, "num_experts_per_tok"), (config, "top_k")):
        if isinstance(value := getattr(owner, name, None), int):
            return value
    raise ValueError(f"model: found no number of experts per token for {path}; supported: {SUPPORTED}")


def expert_activation(experts: Any) -> str:
    """Name of the elementwise part between an expert's projections, see ``ExpertSpec.activation``; ``module`` if
    unknown, which means ``experts._apply_gate`` where the experts are gated and ``experts.act_fn`` elsewhere."""
    if type(experts) is GptOssExperts:
        is_usual = (experts.alpha, experts.limit) == (GPT_OSS_ALPHA, GPT_OSS_LIMIT)
        return "gpt_oss_glu" if is_usual else "module"
    if type(experts) in LISTED_EXPERTS:
        return _activation_name(listed_activation(experts))
    name = _activation_name(getattr(experts, "act_fn", None))
    if not experts.has_gate or name == "module":
        return name
    is_plain = type(experts)._apply_gate is _default_apply_gate and getattr(experts, "is_concatenated", True)
    return f"{name}_glu" if is_plain else "module"


def listed_activation(experts: nn.Module) -> nn.Module:
    """The activation module inside the first expert of a ``ModuleDict``."""
    return experts.get_submodule("expert_0").get_submodule("act")


def _activation_name(function: object) -> str:
    if isinstance(function, (nn.SiLU, SiLUActivation)):
        return "silu"
    if isinstance(function, nn.ReLU):
        return "relu"
    is_gelu = isinstance(function, GELUActivation) or (isinstance(function, nn.GELU) and function.approximate == "none")
    return "gelu" if is_gelu else "module"
