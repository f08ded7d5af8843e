"""The elementwise part of an expert, forward and backward without autograd, into buffers that the caller brings.

Every step is rounded in the tensors' own dtype, as transformers' eager experts do. Legend: ``N`` rows, ``I``
intermediate size, ``P`` width of the pre-activations: ``2I`` where a gate and an up half lie side by side, else ``I``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.models.families import GPT_OSS_ALPHA, GPT_OSS_LIMIT

Pullback = Callable[[Tensor, Tensor], Tensor]
"""(d loss / d output, a spare buffer; both (N, I)) -> d loss / d pre-activations (N, P). May overwrite both arguments
and the pre-activations; call it once."""


class Activation(ABC):
    """Pre-activations (N, P), contiguous, to activations (N, I)."""

    @abstractmethod
    def forward(self, pre_NP: Tensor, out_NI: Tensor) -> None:
        """Writes the activations into ``out_NI``."""

    @abstractmethod
    def linearize(self, pre_NP: Tensor, out_NI: Tensor, scratch_NI: Tensor) -> Pullback:
        """Writes the activations into ``out_NI`` and returns the way back.

        Until the pullback has been called the caller leaves ``pre_NP`` and ``scratch_NI`` alone; ``out_NI`` is its own.
        """


class Elementwise(ABC):
    """A function of one number and its derivative."""

    @abstractmethod
    def forward(self, x: Tensor, out: Tensor) -> None:
        """``out`` may be ``x``."""

    @abstractmethod
    def backward(self, gradient: Tensor, x: Tensor, out: Tensor) -> None:
        """Gradient with respect to ``x``. ``out`` may be ``x``."""


class Silu(Elementwise):
    def forward(self, x: Tensor, out: Tensor) -> None:
        torch.ops.aten.silu.out(x, out=out)

    def backward(self, gradient: Tensor, x: Tensor, out: Tensor) -> None:
        torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)


class Gelu(Elementwise):
    """The exact one, with erf."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        torch.ops.aten.gelu.out(x, out=out)

    def backward(self, gradient: Tensor, x: Tensor, out: Tensor) -> None:
        torch.ops.aten.gelu_backward.grad_input(gradient, x, grad_input=out)


class Relu(Elementwise):
    def forward(self, x: Tensor, out: Tensor) -> None:
        torch.clamp_min(x, 0, out=out)

    def backward(self, gradient: Tensor, x: Tensor, out: Tensor) -> None:
        torch.ops.aten.threshold_backward.grad_input(gradient, x, 0, grad_input=out)


class Plain(Activation):
    """``f(pre)``, for experts without a gate."""

    def __init__(self, function: Elementwise) -> None:
        self.function = function

    def forward(self, pre_NP: Tensor, out_NI: Tensor) -> None:
        self.function.forward(pre_NP, out_NI)

    def linearize(self, pre_NP: Tensor, out_NI: Tensor, scratch_NI: Tensor) -> Pullback:
        self.function.forward(pre_NP, out_NI)

        def pullback(gradient_NI: Tensor, spare_NI: Tensor) -> Tensor:
            self.function.backward(gradient_NI, pre_NP, pre_NP)
            return pre_NP

        return pullback


class Glu(Activation):
    """``f(gate) * up``."""

    def __init__(self, function: Elementwise) -> None:
        self.function = function

    def forward(self, pre_NP: Tensor, out_NI: Tensor) -> None:
        gate_NI, up_NI = pre_NP.chunk(2, dim=-1)
        self.function.forward(gate_NI, out_NI)
        out_NI.mul_(up_NI)

    def linearize(self, pre_NP: Tensor, out_NI: Tensor, scratch_NI: Tensor) -> Pullback:
        gate_NI, up_NI = pre_NP.chunk(2, dim=-1)
        self.function.forward(gate_NI, scratch_NI)
        torch.mul(scratch_NI, up_NI, out=out_NI)

        def pullback(gradient_NI: Tensor, spare_NI: Tensor) -> Tensor:
            # In place over the halves, each after its last use: no (N, 2I) buffer, and the rows are still in cache.
            torch.mul(gradient_NI, up_NI, out=spare_NI)
            self.function.backward(spare_NI, gate_NI, gate_NI)
            torch.mul(gradient_NI, scratch_NI, out=up_NI)
            return pre_NP

        return pullback


class GptOssGlu(Activation):
    """``(up + 1) * gate * sigmoid(alpha * gate)``, gate and up clamped, the two interleaved along ``P``."""

    def _parts(self, pre_NP: Tensor) -> tuple[Tensor, Tensor]:
        gate_NI = pre_NP[:, ::2].clamp(max=GPT_OSS_LIMIT)
        return gate_NI, pre_NP[:, 1::2].clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT).add_(1)

    def forward(self, pre_NP: Tensor, out_NI: Tensor) -> None:
        gate_NI, up_NI = self._parts(pre_NP)
        torch.mul(gate_NI, GPT_OSS_ALPHA, out=out_NI).sigmoid_().mul_(gate_NI).mul_(up_NI)

    def linearize(self, pre_NP: Tensor, out_NI: Tensor, scratch_NI: Tensor) -> Pullback:
        gate_NI, up_NI = self._parts(pre_NP)
        glu_NI = torch.mul(gate_NI, GPT_OSS_ALPHA, out=scratch_NI).sigmoid_().mul_(gate_NI)
        torch.mul(glu_NI, up_NI, out=out_NI)

        def pullback(gradient_NI: Tensor, spare_NI: Tensor) -> Tensor:
            # gate * sigmoid(alpha * gate) is silu(alpha * gate) / alpha: its derivative is silu's at alpha * gate.
            torch.mul(gradient_NI, up_NI, out=spare_NI)
            gate_NI.mul_(GPT_OSS_ALPHA)
            torch.ops.aten.silu_backward.grad_input(spare_NI, gate_NI, grad_input=gate_NI)
            gate_NI.masked_fill_(pre_NP[:, ::2] > GPT_OSS_LIMIT, 0)
            torch.mul(gradient_NI, glu_NI, out=spare_NI)
            spare_NI.masked_fill_(pre_NP[:, 1::2].abs() > GPT_OSS_LIMIT, 0)
            pre_NP[:, ::2] = gate_NI
            pre_NP[:, 1::2] = spare_NI
            return pre_NP

        return pullback


class ModuleActivation(Activation):
    """Whatever the experts module does itself, differentiated by autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def forward(self, pre_NP: Tensor, out_NI: Tensor) -> None:
        with torch.no_grad():
            out_NI.copy_(self.function(pre_NP))

    def linearize(self, pre_NP: Tensor, out_NI: Tensor, scratch_NI: Tensor) -> Pullback:
        with torch.enable_grad():
            leaf_NP = pre_NP.detach().requires_grad_()
            result_NI = self.function(leaf_NP)
        out_NI.copy_(result_NI.detach())

        def pullback(gradient_NI: Tensor, spare_NI: Tensor) -> Tensor:
            return torch.autograd.grad(result_NI, leaf_NP, gradient_NI)[0].contiguous()

        return pullback


_FUNCTIONS: dict[str, type[Elementwise]] = {"silu": Silu, "gelu": Gelu, "relu": Relu}
ACTIVATIONS = (*_FUNCTIONS, *(f"{name}_glu" for name in _FUNCTIONS), "gpt_oss_glu", "module")
"""Every name that ``make_activation`` knows."""


def make_activation(name: str, *, has_gate: bool, module: Any = None) -> Activation:
    """The elementwise part called ``name`` (see ``ExpertSpec.activation``).

    ``module``: the experts module, needed for ``module`` only: its ``_apply_gate`` (gated) or ``act_fn`` is called.
    Raises ``ValueError`` for an unknown name, a gate that does not fit ``has_gate``, or a missing module.
    """
    if name == "module":
        if not isinstance(module, nn.Module):
            raise ValueError(
                "activation_module: got None for activation 'module', wanted the experts module whose function it is"
            )
        owner: Any = module
        return ModuleActivation(owner._apply_gate if has_gate else owner.act_fn)
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, wanted one of {', '.join(ACTIVATIONS)}")
    if name.endswith("_glu") != has_gate:
        kind = "gated" if has_gate else "not gated"
        raise ValueError(f"activation: got {name!r} for experts that are {kind}; only names ending in _glu are gated")
    if name == "gpt_oss_glu":
        return GptOssGlu()
    function = _FUNCTIONS[name.removesuffix("_glu")]()
    return Glu(function) if has_gate else Plain(function)
