"""Keeping packed documents apart in models that do not see from the position ids where documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

BLIND_MODEL_TYPES = {"gpt_oss"}
"""Decoders that build their masks without the position ids (transformers 5.23), so that packed documents would see one
another. All others of the families we support need nothing."""


def keep_documents_apart(model: PreTrainedModel) -> RemovableHandle | None:
    """Makes ``model`` mask packed sequences (``MicroBatch``) block by block, if it does not do so by itself.

    Mutates ``model``: a hook before its decoder builds the masks wherever position ids come without an attention mask
    and without a cache. The attention mask stays unset for everything outside of the decoder, since the router's
    auxiliary loss would take it for padding. Returns the hook's handle, or None where the model needs none.
    """
    if model.config.model_type not in BLIND_MODEL_TYPES:
        return None
    return model.base_model.register_forward_pre_hook(_add_masks, with_kwargs=True)


def _add_masks(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    position_ids_BS = kwargs.get("position_ids")
    unwanted = ("attention_mask", "past_key_values", "inputs_embeds")
    if position_ids_BS is None or kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in unwanted):
        return None
    assert isinstance(decoder, PreTrainedModel)
    input_ids_BS = kwargs["input_ids"]
    arguments = {
        "config": decoder.config,
        # Only its shape, dtype and device are looked at.
        "inputs_embeds": torch.empty((*input_ids_BS.shape, 0), dtype=decoder.dtype, device=input_ids_BS.device),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids_BS,
    }
    masks = {
        "full_attention": create_causal_mask(**arguments),
        "sliding_attention": create_sliding_window_causal_mask(**arguments),
    }
    return args, {**kwargs, "attention_mask": masks}
