"""Least squares over streams of rows, sub-block by sub-block: sums of products now, one solve at the end.

Shapes: N sub-blocks, M rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Regression:
    """Finds for every sub-block the matrix (O, I) that maps its inputs to its targets with the least squared error."""

    def __init__(self, *, has_constant: bool) -> None:
        self._has_constant = has_constant
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self.num_rows = 0

    def add(self, inputs_NMI: Tensor, targets_NMO: Tensor) -> None:
        with torch.autocast(inputs_NMI.device.type, enabled=False):
            inputs = inputs_NMI.float()
            if self._has_constant:
                inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
            gram, cross = inputs.mT @ inputs, inputs.mT @ targets_NMO.float()
        self._gram = gram if self._gram is None else self._gram.add_(gram)
        self._cross = cross if self._cross is None else self._cross.add_(cross)
        self.num_rows += inputs.shape[1]

    def solve(self, prior_NOI: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """(matrices (N, O, I), constants (N, O) or None). The ridge, a share of the inputs' mean square, pulls towards
        ``prior_NOI``, or towards nothing: what the rows do not determine stays as it was."""
        assert self._gram is not None and self._cross is not None
        gram, cross = self._gram.double(), self._cross.double()
        num_inputs = gram.shape[-1] - self._has_constant
        strength = ridge * gram.diagonal(dim1=-2, dim2=-1)[:, :num_inputs].mean(dim=-1)
        pull = torch.zeros_like(gram[..., 0])
        pull[:, :num_inputs] = strength[:, None].clamp(min=1e-12)
        if prior_NOI is not None:
            cross[:, :num_inputs] += strength[:, None, None] * prior_NOI.double().mT
        # One after the other: MKL's batched solvers fail now and then with several threads.
        solved = [
            torch.cholesky_solve(right, torch.linalg.cholesky(left))
            for left, right in zip(gram + torch.diag_embed(pull), cross, strict=True)
        ]
        solution = torch.stack(solved).mT.float()
        if not self._has_constant:
            return solution, None
        return solution[..., :-1], solution[..., -1]


class Scaling:
    """Finds for every unit the factor and the offset that map an input to its target with the least squared error."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0)
        self.num_rows = 0

    def add(self, inputs_MH: Tensor, targets_MH: Tensor) -> None:
        x, y = inputs_MH.double(), targets_MH.double()
        sums = torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)])
        self._sums = sums if not self.num_rows else self._sums + sums
        self.num_rows += len(x)

    def solve(self, *, has_offset: bool) -> tuple[Tensor, Tensor]:
        """(factors (H,), offsets (H,)); no offset: zeros."""
        x, y, xx, xy = self._sums / self.num_rows
        if not has_offset:
            return (xy / xx.clamp(min=1e-12)).float(), torch.zeros_like(x).float()
        factors = (xy - x * y) / (xx - x * x).clamp(min=1e-12)
        return factors.float(), (y - factors * x).float()
