"""The linear probe: logistic regression on a model's vectors, which stay as they are."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

PENALTY = 1e-3
"""Weight of the mean squared weight beside the mean loss."""
_MAX_STEPS = 200


def probe(train_NH: np.ndarray, train_labels_N: np.ndarray, test_MH: np.ndarray, *, num_labels: int) -> np.ndarray:
    """The labels predicted for ``test_MH``, (M,) int64. Units are scaled to the training vectors' mean 0 and deviation
    1; L-BFGS from zero, so the answer depends on nothing that is drawn. Blocks."""
    mean, deviation = train_NH.mean(axis=0), train_NH.std(axis=0) + 1e-6
    inputs, test = (torch.from_numpy((values - mean) / deviation).double() for values in (train_NH, test_MH))
    labels = torch.from_numpy(train_labels_N).long()
    weight = torch.zeros(num_labels, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_labels, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return F.linear(test, weight, bias).argmax(dim=1).numpy()
