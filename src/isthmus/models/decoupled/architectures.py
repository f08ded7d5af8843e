"""Decoupled models as transformers knows models: ``AutoModel…`` builds, loads and saves them once this is imported.

Each is a subclass of the family's own model in which every layer that is not original is a decoupled one. Keys and, in
the published form, shapes of the weights are the family's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from isthmus.models.decoupled import layers
from isthmus.models.decoupled.configs import CONFIGS

_HEADS = {
    "Model": "AutoModel",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
}
"""Which of a family's classes which ``Auto`` class builds; a family has some of them."""


@dataclass(frozen=True)
class _Family:
    name: str
    """What the family's class names begin with."""
    layers: Callable[[Any], nn.ModuleList]
    """Of the bare model."""
    layer: Callable[..., nn.Module]


FAMILIES: dict[str, _Family] = {
    "bert": _Family("Bert", lambda body: body.encoder.layer, layers.DecoupledBertLayer),
    "roberta": _Family("Roberta", lambda body: body.encoder.layer, layers.DecoupledRobertaLayer),
    "gpt2": _Family("GPT2", lambda body: body.h, layers.DecoupledGpt2Block),
    "llama": _Family("Llama", lambda body: body.layers, layers.DecoupledLlamaDecoderLayer),
    "mistral": _Family("Mistral", lambda body: body.layers, layers.DecoupledMistralDecoderLayer),
    "qwen2": _Family("Qwen2", lambda body: body.layers, layers.DecoupledQwen2DecoderLayer),
    "qwen3": _Family("Qwen3", lambda body: body.layers, layers.DecoupledQwen3DecoderLayer),
}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model of one of ``FAMILIES``, decoupled or not, with a head or bare."""
    config: Any = model.config
    family = FAMILIES[getattr(config, "base_model_type", config.model_type)]
    return family.layers(model.base_model)


def _decouple_layers(model: PreTrainedModel) -> None:
    config: Any = model.config
    family = FAMILIES[config.base_model_type]
    modules = family.layers(model.base_model)
    originals = config.decoupling.original_layers
    for number in range(len(modules)):
        if number not in originals:
            modules[number] = family.layer(config, layer_idx=number)
    model.post_init()


def _decoupled(base: type[PreTrainedModel], config_class: type) -> type[PreTrainedModel]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(decoupled, self).__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _decouple_layers(self)

    name = f"Decoupled{base.__name__}"
    decoupled = type(
        name,
        (base,),
        {"__init__": __init__, "__module__": __name__, "config_class": config_class, "__doc__": base.__doc__},
    )
    globals()[name] = decoupled
    return decoupled


def _classes() -> dict[tuple[str, str], type[PreTrainedModel]]:
    """Decoupled classes by model type of the base and ``Auto`` class."""
    classes = {}
    for model_type, family in FAMILIES.items():
        for suffix, auto_class in _HEADS.items():
            base = getattr(transformers, family.name + suffix, None)
            if base is not None:
                classes[model_type, auto_class] = _decoupled(base, CONFIGS[model_type])
    return classes


CLASSES = _classes()
for (_model_type, _auto_class), _class in CLASSES.items():
    getattr(transformers, _auto_class).register(CONFIGS[_model_type], _class, exist_ok=True)


def auto_class_of(config: Any) -> str:
    """Which ``Auto`` class loads a checkpoint with all its weights: by ``architectures``, else the bare model, or the
    language model of a family of decoders."""
    model_type = getattr(config, "base_model_type", None) or config.model_type
    family = FAMILIES[model_type]
    for name in config.architectures or ():
        auto_class = _HEADS.get(name.removeprefix("Decoupled").removeprefix(family.name))
        if auto_class is not None:
            return auto_class
    return "AutoModel" if model_type in ("bert", "roberta") else "AutoModelForCausalLM"
