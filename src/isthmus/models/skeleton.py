"""A Hugging Face model without its weights: every parameter on ``meta``, every buffer real and correct."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from isthmus.models.families import SUPPORTED

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def torch_dtype(dtype: str) -> torch.dtype:
    """``fp32`` or ``bf16`` as torch knows it. Raises ``ValueError`` for anything else."""
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[dtype]


def build_skeleton(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The causal or sequence-to-sequence language model that ``config`` describes.

    Parameters are on ``meta`` in ``dtype``; tied ones are the same object. Buffers are on the CPU with the values that
    transformers initialises them to (persistent ones are then read from the checkpoint). ``config`` is not changed;
    that it says how a checkpoint is quantised means nothing here.
    Raises ``ValueError`` where transformers has no such language model.
    """
    config = copy.deepcopy(config)
    # How a checkpoint's weights are stored is the reader's matter: what is built, trained and written is not quantised.
    vars(config).pop("quantization_config", None)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in auto_class._model_mapping:
        kind = "sequence-to-sequence" if config.is_encoder_decoder else "causal"
        raise ValueError(
            f"model: {config.model_type!r} has no {kind} language model in transformers; wanted a Mixture-of-Experts "
            f"language model: {SUPPORTED}"
        )
    with torch.device("meta"):
        module = auto_class.from_config(config, dtype=torch_dtype(dtype))
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            is_fp32 = buffer.is_floating_point() and is_kept_in_fp32(module, name)
            child._buffers[name] = torch.zeros(
                buffer.shape, dtype=torch.float32 if is_fp32 else buffer.dtype, device="cpu"
            )
    # Parameters on meta have nothing to initialise; what this fills in are the buffers (rotary frequencies, positions).
    module.initialize_weights()
    return module


def is_kept_in_fp32(module: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps this parameter or buffer in FP32 even in a bf16 model."""
    patterns = module._keep_in_fp32_modules_strict or ()
    return any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) for pattern in patterns)


def fp32_router_parameters(module: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters of the routers that cast themselves to FP32 in their first forward (Switch, NLLB-MoE).

    Raises ``ValueError`` for a ``router_dtype`` that would cast them, in place, to anything else.
    """
    parameters: set[nn.Parameter] = set()
    for router in module.modules():
        if isinstance(router, (SwitchTransformersTop1Router, NllbMoeTop2Router)):
            if router.dtype != torch.float32:
                raise ValueError(
                    f"router_dtype: got {str(router.dtype).removeprefix('torch.')}, wanted float32; change config.json"
                )
            parameters.update(router.classifier.parameters())
    return parameters
