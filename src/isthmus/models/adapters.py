"""How isthmus steps into a Hugging Face model's forward: at the routed experts and at the routers, always on the
instance.

``T`` tokens, ``H`` hidden, ``E`` experts, ``k`` experts per token. An index equal to ``E`` means "no expert".
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ExpertsInterface
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from isthmus.models.families import LISTED_EXPERTS, listed_activation

EXPERTS_IMPLEMENTATION = "isthmus"
"""Name under which transformers knows our experts implementation."""

ExpertsCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden_TH, top_k_index_Tk, top_k_weights_Tk) -> out_TH"""


def _call_unset(hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("experts: no function is set; call MoeModel.set_experts_function before the forward pass")


def _dispatch(
    self: nn.Module, hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor
) -> torch.Tensor:
    return self.isthmus_call(hidden_TH, top_k_index_Tk, top_k_weights_Tk)  # pyright: ignore[reportCallIssue]


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _dispatch)


def adapt_experts(experts: nn.Module) -> None:
    """Makes ``experts`` ask ``set_experts_call``'s function. Mutates the instance only."""
    set_experts_call(experts, _call_unset)
    if type(experts) in LISTED_EXPERTS:
        forward = _nllb_forward if isinstance(experts, NllbMoeExperts) else _switch_forward
        experts.forward = MethodType(forward, experts)
        # Straight into __dict__: a ModuleDict would take the module for one more expert.
        experts.__dict__["act_fn"] = listed_activation(experts)


def set_experts_call(experts: nn.Module, call: ExpertsCall) -> None:
    """From now on ``call`` computes these experts."""
    experts.__dict__["isthmus_call"] = call


def _switch_forward(
    self: nn.Module, hidden_TH: torch.Tensor, mask_T1E: torch.Tensor, weights_T1: torch.Tensor
) -> torch.Tensor:
    """``mask_T1E`` is one-hot, all zero for tokens that an expert's capacity dropped."""
    num_experts = mask_T1E.shape[-1]
    is_kept_T1 = mask_T1E.sum(dim=-1) > 0
    index_T1 = mask_T1E.argmax(dim=-1).masked_fill(~is_kept_T1, num_experts)
    return _dispatch(self, hidden_TH, index_T1, weights_T1).to(hidden_TH.dtype)


def _nllb_forward(
    self: nn.Module, hidden_TH: torch.Tensor, top_1_mask_TE: torch.Tensor, probabilities_TE: torch.Tensor
) -> torch.Tensor:
    """Σ_e p_e · expert_e(x) over the at most two experts with p_e > 0.

    transformers 5.23.0 one-hots the mask, which is one-hot already, and so runs experts 0 and 1 only; the sum is
    what NLLB-MoE means.
    """
    num_experts = probabilities_TE.shape[-1]
    weights_Tk, index_Tk = probabilities_TE.topk(min(2, num_experts), dim=-1)
    index_Tk = index_Tk.masked_fill(weights_Tk <= 0, num_experts)
    dropout: float = self.moe_token_dropout  # pyright: ignore[reportAssignmentType]
    if dropout == 0:
        return _dispatch(self, hidden_TH, index_Tk, weights_Tk).to(hidden_TH.dtype)
    if not self.training:
        return (_dispatch(self, hidden_TH, index_Tk, weights_Tk) * (1 - dropout)).to(hidden_TH.dtype)
    # Each chosen expert's output is dropped out by itself, so the choices must come back one by one.
    num_tokens, k = index_Tk.shape
    stacked = _dispatch(self, hidden_TH.repeat(k, 1), index_Tk.T.reshape(-1, 1), weights_Tk.T.reshape(-1, 1))
    return F.dropout(stacked, dropout).view(k, num_tokens, -1).sum(dim=0).to(hidden_TH.dtype)


def replace_logits(
    router: nn.Module, logits_index: int, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """What the router returns as logits becomes ``function(logits)``; its choice of experts and their weights stay.

    The hook runs before the one with which transformers captures the logits for the auxiliary loss.
    """

    def hook(module: nn.Module, arguments: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (*output[:logits_index], function(output[logits_index]), *output[logits_index + 1 :])

    return router.register_forward_hook(hook, prepend=True)


class _AddToLinear(TorchFunctionMode):
    """Adds ``bias_E`` to what ``F.linear`` returns. Every router computes its logits with the one linear it has."""

    def __init__(self, bias_E: torch.Tensor) -> None:
        super().__init__()
        self.bias_E = bias_E
        self.num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return result
        self.num_calls += 1
        return result + self.bias_E.to(device=result.device, dtype=result.dtype)


def bias_logits(router: nn.Module, bias_E: torch.Tensor) -> None:
    """From now on ``bias_E`` is added to the router's logits before it chooses. Replaces an earlier bias."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _AddToLinear(bias_E) as mode:
            output = type(self).forward(self, *args, **kwargs)
        if mode.num_calls != 1:
            raise RuntimeError(
                f"router bias: {type(self).__name__} called F.linear {mode.num_calls} times, wanted once"
            )
        return output

    router.forward = MethodType(forward, router)
