"""Muon (Jordan et al. 2024) for matrices that are several matrices side by side, as sub-blocks are.

The update of a matrix is its momentum, made orthogonal by five Newton–Schulz steps in bf16. A matrix that holds
independent ones is made so part by part: that is their gradient's geometry, and N parts of a matrix cost an N-th of it.
Matrices of one shape go through together, in batched products.

Shapes: K matrices of R rows and C columns, R ≤ C.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, to which these are scaled (Liu et al. 2025, section 2.2): one learning rate fits
both."""


class BlockMuon(torch.optim.Optimizer):
    """``parts`` in a group of parameters says how its matrices are cut: (dimension, sizes), or None for whole ones.

    Nesterov's momentum, decoupled weight decay. Parameters without a gradient are left alone.
    """

    def __init__(
        self,
        params: Iterable[Mapping[str, Any]],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": None}
        super().__init__(list(map(dict, params)), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        assert closure is None
        stacks: dict[tuple[int, ...], list[tuple[Tensor, Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(buffer, group["momentum"])
                dim, sizes = group["parts"] or (0, [len(parameter)])
                for part, update in zip(parameter.split(sizes, dim), direction.split(sizes, dim), strict=True):
                    stacks[tuple(part.shape)].append((part, update, group))
        for shape, entries in stacks.items():
            updates = orthogonal(torch.stack([update for _, update, _ in entries]))
            scale = ADAMW_RMS * max(shape) ** 0.5
            for (part, _, group), update in zip(entries, updates, strict=True):
                part.mul_(1 - group["lr"] * group["weight_decay"])
                part.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices_KRC: Tensor) -> Tensor:
    """About the nearest matrices whose singular values are all 1 (0.7 to 1.2), in bf16."""
    is_tall = matrices_KRC.shape[-2] > matrices_KRC.shape[-1]
    x = matrices_KRC.bfloat16()
    x = x.mT.contiguous() if is_tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
