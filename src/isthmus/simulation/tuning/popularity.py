"""Which share of a layer's tokens every expert gets, step by step: drawn for a wanted skewness, or from a trace.

Legend: ``L`` MoE layers, ``E`` experts of a layer, ``k`` choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.popularity_trace import PopularityTrace, read_trace
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ModelSpec

Floats = NDArray[np.float64]
NUM_BISECTIONS = 60


def shares_with_skewness(num_experts: int, most: float, target_g: float) -> Floats:
    """(E,) shares with Σ p² = ``target_g`` that fall as a power of the rank, as a language's words do, none above
    ``most``. Raises ``IsthmusError`` for what is out of reach."""
    lowest = 1 / num_experts
    if not lowest <= target_g <= most or target_g == 1:
        raise IsthmusError(
            f"popularity: got gini={target_g:g}, wanted {lowest:.4f}, all {num_experts} experts equally popular, to "
            f"{most:.4f}, all tokens with as few as can be"
        )
    low, high = 0.0, 60.0
    ranks = np.log(np.arange(1, num_experts + 1))
    shares = np.full(num_experts, lowest)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        shares = _capped(np.exp(-middle * ranks), most)
        low, high = (middle, high) if np.square(shares).sum() < target_g else (low, middle)
    return shares


def _capped(weights: Floats, most: float) -> Floats:
    """Shares in proportion to ``weights`` (falling), none above ``most``."""
    shares = weights / weights.sum()
    for number in range(len(weights)):
        if shares[number] <= most:
            break
        rest = weights[number + 1 :].sum()
        shares[number] = most
        if rest > 0:
            shares[number + 1 :] = weights[number + 1 :] * max(0.0, 1 - most * (number + 1)) / rest
    return shares


class DrawnPopularity:
    """The same skewness in every layer, each with its own order of experts. ``drift``: from one step to the next every
    expert is, with this probability, among those that exchange their popularity."""

    def __init__(
        self, spec: ModelSpec, target_g: float | None, *, drift: float = 0.0, seed: int = 0, is_capped: bool = True
    ) -> None:
        """``target_g`` None: all experts are equally popular. ``is_capped``: a token's k choices are different experts,
        so none has more than 1 ÷ k of them; published figures come from a simulator that did not know that."""
        if not 0 <= drift <= 1:
            raise IsthmusError(f"drift: got {drift}, wanted 0 (the same in every step) to 1 (all exchanged)")
        self._spec = spec
        self._drift = drift
        self._random = np.random.default_rng(seed)
        self._ranked = {
            layer: shares_with_skewness(
                expert.num_experts, 1 / expert.top_k if is_capped else 1.0, target_g or 1 / expert.num_experts
            )
            for layer in spec.moe_layers
            if (expert := spec.layers[layer]) is not None
        }

    def steps(self, num_tokens: int) -> Iterator[dict[int, Floats]]:
        """Tokens (E,) of every MoE layer's experts, all k choices together, step after step without end."""
        shares = {layer: self._random.permutation(ranked) for layer, ranked in self._ranked.items()}
        while True:
            yield self._counts(shares, num_tokens)
            if self._drift:
                for share in shares.values():
                    moving = np.flatnonzero(self._random.random(len(share)) < self._drift)
                    share[moving] = share[self._random.permutation(moving)]

    def _counts(self, shares: Mapping[int, Floats], num_tokens: int) -> dict[int, Floats]:
        """Layers with as many experts and choices are rounded together."""
        alike: dict[tuple[int, int], list[int]] = {}
        for layer, share in shares.items():
            alike.setdefault((len(share), self._pairs(layer, num_tokens)), []).append(layer)
        found: dict[int, Floats] = {}
        for (_, num_pairs), layers in alike.items():
            counts_LE = whole_counts(np.stack([shares[layer] for layer in layers]), num_pairs)
            found.update(zip(layers, counts_LE, strict=True))
        return {layer: found[layer] for layer in shares}

    def _pairs(self, layer: int, num_tokens: int) -> int:
        expert = self._spec.layers[layer]
        assert expert is not None
        return num_tokens * expert.top_k


class TracedPopularity:
    """As recorded, scaled to a step's tokens; from the start again after the last recorded step."""

    def __init__(self, spec: ModelSpec, trace: PopularityTrace) -> None:
        """Raises ``IsthmusError`` for a trace of another model."""
        trace.check(spec)
        self._spec = spec
        self._trace = trace

    def steps(self, num_tokens: int) -> Iterator[dict[int, Floats]]:
        while True:
            for counts_LE in self._trace.counts:
                found: dict[int, Floats] = {}
                for row, layer in zip(counts_LE, self._spec.moe_layers, strict=True):
                    expert = self._spec.layers[layer]
                    assert expert is not None
                    counts = row[: expert.num_experts].astype(np.float64)
                    share = counts / counts.sum() if counts.sum() else np.full(len(counts), 1 / len(counts))
                    found[layer] = whole_counts(share, num_tokens * expert.top_k)
                yield found


def whole_counts(shares_E: Sequence[float] | Floats, num_pairs: int) -> Floats:
    """Whole tokens (…, E) in these shares that sum to ``num_pairs``: the largest remainders are rounded up."""
    exact_E = np.asarray(shares_E, dtype=np.float64) * num_pairs
    counts_E = np.floor(exact_E)
    missing = np.rint(num_pairs - counts_E.sum(axis=-1, keepdims=True))
    order_E = np.argsort(counts_E - exact_E, axis=-1, kind="stable")
    is_up_E = np.zeros_like(counts_E)
    np.put_along_axis(is_up_E, order_E, (np.arange(counts_E.shape[-1]) < missing).astype(np.float64), axis=-1)
    return counts_E + is_up_E


def find_popularity(
    text: str, spec: ModelSpec, *, drift: float = 0.0, seed: int = 0
) -> Callable[[], DrawnPopularity | TracedPopularity]:
    """What makes the popularity that ``text`` names anew: ``uniform``, ``gini=G``, or a trace's file. Raises
    ``IsthmusError`` for what is none of them, or cannot be for this model."""
    if text == "uniform" or text.startswith("gini="):
        target: float | None = None
        if text != "uniform":
            try:
                target = float(text.removeprefix("gini="))
            except ValueError:
                raise IsthmusError(f"popularity: got {text!r}, wanted a number after gini=, such as gini=0.4") from None
        DrawnPopularity(spec, target, drift=drift)  # says at once what cannot be
        return lambda: DrawnPopularity(spec, target, drift=drift, seed=seed)
    if drift:
        raise IsthmusError("drift: is for drawn popularity; a trace has its own")
    trace = read_trace(Path(text))
    trace.check(spec)
    return lambda: TracedPopularity(spec, trace)
