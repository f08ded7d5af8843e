"""Predicts which experts the tokens of a layer will choose, one MoE layer ahead (APTMoE, section 4.2, inter-layer
phase).

Legend: ``T`` tokens, ``H`` hidden size, ``E`` experts, ``k`` choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.models.routing import count_by_expert


@dataclass(slots=True)
class PredictorQuality:
    """Sums over everything predicted so far."""

    right_choices: int = 0
    choices: int = 0
    right_quarter: int = 0
    quarter: int = 0

    @property
    def token_accuracy(self) -> float | None:
        """Share of the experts chosen by tokens that were predicted."""
        return self.right_choices / self.choices if self.choices else None

    @property
    def least_popular_quarter_accuracy(self) -> float | None:
        """Share of a layer's least popular quarter of experts that were predicted to be in it."""
        return self.right_quarter / self.quarter if self.quarter else None


class PopularityPredictor:
    """One linear layer per MoE layer, of its router's shape and with a bias, fed with what the router BEFORE it sees.

    Starts from the target router's weights and learns online from the target's real choices (plain SGD on the
    cross-entropy against the chosen experts). Reads the model, never changes it.
    """

    def __init__(
        self, routers: dict[int, tuple[Tensor, int]], *, learning_rate: float = 0.5, device: torch.device
    ) -> None:
        """``routers``: layer -> (router weight (E, H), k)."""
        self._weights = {
            layer: torch.cat([weight, weight.new_zeros(len(weight), 1)], dim=1).detach().to(device, torch.float32)
            for layer, (weight, _) in routers.items()
        }
        self._top_k = {layer: k for layer, (_, k) in routers.items()}
        self._learning_rate = learning_rate
        self._seen: dict[int, list[tuple[Tensor, Tensor, list[int]]]] = {}
        self.quality = PredictorQuality()

    @torch.no_grad()
    def predict(self, layer: int, previous_hidden_TH: Tensor) -> list[int]:
        """Predicted tokens per expert of ``layer``, from the hidden states that the previous MoE layer's router saw."""
        inputs_TH = _inputs(previous_hidden_TH)
        choice_Tk = (inputs_TH @ self._weights[layer].T).topk(self._top_k[layer], dim=-1).indices
        counts_E = count_by_expert(choice_Tk, self._weights[layer].shape[0])
        self._seen.setdefault(layer, []).append((inputs_TH, choice_Tk, counts_E))
        return list(counts_E)

    @torch.no_grad()
    def learn(self, layer: int, index_Tk: Tensor) -> None:
        """Scores the oldest open prediction of ``layer`` against the router's real choices (T, k), then learns from
        them."""
        seen = self._seen.get(layer)
        if not seen:
            return
        inputs_TH, choice_Tk, predicted_E = seen.pop(0)
        weight_EH = self._weights[layer]
        num_experts = weight_EH.shape[0]
        real_TE = torch.zeros(len(inputs_TH), num_experts + 1, device=weight_EH.device)
        real_TE = real_TE.scatter_(1, index_Tk, 1.0)[:, :num_experts]
        # All that the host wants to know in one transfer: each would wait for the device.
        *real_E, right = torch.cat([real_TE.sum(0), real_TE.gather(1, choice_Tk).sum().view(1)]).tolist()
        self._score(predicted_E, real_E, int(right))
        target_TE = real_TE / real_TE.sum(1, keepdim=True).clamp_min(1.0)
        error_TE = torch.softmax(inputs_TH @ weight_EH.T, dim=-1) - target_TE
        step = self._learning_rate / inputs_TH.shape[1] * num_experts / len(inputs_TH)
        weight_EH -= step * (error_TE.T @ inputs_TH)

    def _score(self, predicted_E: list[int], real_E: list[float], num_right: int) -> None:
        quality, quarter = self.quality, max(1, len(real_E) // 4)
        quality.right_choices += num_right
        quality.choices += int(sum(real_E))
        quality.right_quarter += len(_least(predicted_E, quarter) & _least(real_E, quarter))
        quality.quarter += quarter

    def state_dict(self) -> dict[str, Tensor]:
        return {str(layer): weight for layer, weight in self._weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Layers that are not predicted here are passed over, those of which nothing was saved stay."""
        for layer, weight in state.items():
            if int(layer) in self._weights:
                self._weights[int(layer)].copy_(weight)


def _least(counts_E: Sequence[float], num: int) -> set[int]:
    """The ``num`` least popular experts, of equals those of lower number."""
    return set(sorted(range(len(counts_E)), key=counts_E.__getitem__)[:num])


def _inputs(hidden_TH: Tensor) -> Tensor:
    """(T, H + 1): hidden states of unit mean square, as a router sees them behind its norm, and a one for a bias."""
    scale_T1 = hidden_TH.shape[1] ** 0.5 / hidden_TH.float().norm(dim=1, keepdim=True).clamp_min(1e-6)
    return torch.cat([hidden_TH.float() * scale_T1, torch.ones_like(scale_T1)], dim=1)
