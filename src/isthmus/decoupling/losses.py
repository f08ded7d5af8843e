"""What the decoupled copy is trained to do: give what the original gives, where the two can be compared.

Shapes: B texts, T tokens, M tokens that are no padding, H hidden units, L layers, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each part counts."""

    original: float = 1.0
    """Hidden states after layers that are original: all slices meet there."""
    decoupled: float = 1.0
    """Hidden states after decoupled layers."""
    pooled: float = 5.0
    """1 - cosine of the mean over a text's tokens."""
    pairs: float = 5.0
    """Mean squared difference of cosines between the texts of a batch."""
    logits: float = 1.0
    """Kullback–Leibler divergence of the next word's distribution, or of a classifier's labels', in nats."""


def hidden_loss(ours_MH: Tensor, theirs_MH: Tensor) -> Tensor:
    """Squared error by the original's variance: 1 for a copy that knows nothing but each unit's mean."""
    variance = (theirs_MH - theirs_MH.mean(dim=0)).square().mean()
    return (ours_MH - theirs_MH).square().mean() / variance.clamp(min=1e-12)


def pool(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over each text's tokens, (B, H)."""
    mask = mask_BT.unsqueeze(-1).to(hidden_BTH.dtype)
    return (hidden_BTH * mask).sum(dim=1) / mask.sum(dim=1)


def pooled_losses(ours_BH: Tensor, theirs_BH: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - cosine, mean squared difference of all pairs' cosines within the batch)."""
    ours, theirs = F.normalize(ours_BH, dim=1), F.normalize(theirs_BH, dim=1)
    pairs = (ours @ ours.T - theirs @ theirs.T).square()
    num_pairs = max(1, len(ours) * (len(ours) - 1))
    return 1 - (ours * theirs).sum(dim=1).mean(), pairs.sum() / num_pairs


def divergence(our_logits_MV: Tensor, their_logits_MV: Tensor) -> Tensor:
    """Mean over tokens of Σ p log(p / q), p the original's."""
    ours, theirs = F.log_softmax(our_logits_MV.float(), dim=-1), F.log_softmax(their_logits_MV.float(), dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(dim=-1).mean()


def hidden_losses(ours_LMH: Sequence[Tensor], theirs_LMH: Sequence[Tensor], weights_L: Sequence[float]) -> Tensor:
    """Σ over layers of weight × ``hidden_loss`` of the hidden states after each layer."""
    total = torch.zeros(())
    for ours_MH, theirs_MH, weight in zip(ours_LMH, theirs_LMH, weights_L, strict=True):
        if weight:
            total = total + weight * hidden_loss(ours_MH.float(), theirs_MH.float())
    return total
