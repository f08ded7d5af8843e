"""What a policy is told of the next layer, in a rehearsal: right as often as the runtime's predictor, and as slow."""

from __future__ import annotations

import torch

from isthmus.spec.model import ModelSpec
from isthmus.tuning.predictor import PopularityPredictor

PREDICTED_SHARE = 0.85
"""Of tokens whose experts in the next layer the runtime's predictor gets right."""


class Guess:
    """Right for a share of the tokens; the others are spread evenly. Stands in for a ``PopularityPredictor``."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, *, takes_time: bool) -> None:
        """``takes_time``: a predictor works with random hidden states of ``dtype``, and what it finds is not used."""
        self._counts_LE: dict[int, list[int]] = {}
        self._layers = {number: layer for number, layer in enumerate(spec.layers) if layer is not None}
        self._random = torch.Generator().manual_seed(0)  # a run's own numbers stay as they are
        self._real = self._predictor() if takes_time else None
        self._dtype = dtype
        self._hidden_TH = torch.empty(0, 0)
        self._index_Tk = torch.empty(0, 0, dtype=torch.int64)

    def _predictor(self) -> PopularityPredictor:
        routers = {
            number: (torch.randn(layer.num_experts, layer.hidden_size, generator=self._random), layer.top_k)
            for number, layer in list(self._layers.items())[1:]
        }
        return PopularityPredictor(routers, device=torch.device("cpu"))

    def expect(self, counts_LE: dict[int, list[int]], num_tokens: int) -> None:
        """What comes is of a wave of so many tokens."""
        self._counts_LE = counts_LE
        if self._real is not None and len(self._hidden_TH) != num_tokens:
            layer = min(self._layers.values(), key=lambda layer: layer.num_experts)
            self._hidden_TH = torch.randn(num_tokens, layer.hidden_size, generator=self._random).to(self._dtype)
            scores_TE = torch.rand(num_tokens, layer.num_experts, generator=self._random)
            self._index_Tk = scores_TE.topk(layer.top_k).indices

    def learn(self, layer: int, index_Tk: object) -> None:
        if self._real is not None:
            self._real.learn(layer, self._index_Tk)

    def predict(self, layer: int, hidden_TH: object) -> list[int]:
        if self._real is not None:
            self._real.predict(layer, self._hidden_TH)
        counts_E = self._counts_LE[layer]
        even = sum(counts_E) / len(counts_E)
        return [round(PREDICTED_SHARE * count + (1 - PREDICTED_SHARE) * even) for count in counts_E]
