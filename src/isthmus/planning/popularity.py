"""How unevenly tokens choose experts: measuring it, remembering it, and routing with a wanted unevenness.

Legend: ``T`` tokens, ``E`` experts, ``L`` layers, ``k`` choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isthmus.spec.errors import IsthmusError

Floats = NDArray[np.float64]
NUM_BISECTIONS = 60


def skewness(counts_LE: Sequence[ArrayLike]) -> float:
    """G = mean over layers of Σ_e p_e², p_e the share of the layer's tokens that chose expert e (APTMoE, section 5).

    1 ÷ E when all are equally popular. Layers without tokens do not count; 0 if none has any.
    """
    values = []
    for counts in counts_LE:
        counts_E = np.asarray(counts, dtype=np.float64)
        if counts_E.sum() > 0:
            values.append(float(np.square(counts_E / counts_E.sum()).sum()))
    return float(np.mean(values)) if values else 0.0


def blend_history(
    history_E: Sequence[float] | None, counts_E: Sequence[int], *, keep: float = 0.5
) -> tuple[float, ...]:
    """The popularity (shares that sum to 1) after a step with ``counts_E``: ``keep`` × history + the rest × now.

    This is the historical popularity of the inter-stage phase (APTMoE, section 4.2). Without history, the step alone
    counts; a step without tokens leaves the history as it is (uniform if there is none).
    """
    if not 0 <= keep < 1:
        raise ValueError(f"keep: got {keep}, wanted 0 or more and less than 1, such as 0.5")
    if history_E is not None and len(history_E) != len(counts_E):
        raise ValueError(f"history_E: got {len(history_E)} experts, wanted {len(counts_E)} as in counts_E")
    total = sum(counts_E)
    if not total:
        return tuple(history_E) if history_E is not None else (1.0 / len(counts_E),) * len(counts_E)
    shares = [count / total for count in counts_E]
    if history_E is None:
        return tuple(shares)
    return tuple(keep * old + (1 - keep) * new for old, new in zip(history_E, shares, strict=True))


def routed_counts(logits_TE: ArrayLike, top_k: int) -> NDArray[np.int64]:
    """Tokens per expert (E,) when every token chooses its ``top_k`` largest logits."""
    logits = np.asarray(logits_TE, dtype=np.float64)
    chosen = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.reshape(-1), minlength=logits.shape[1])


def solve_router_bias(
    logits_TE: ArrayLike, top_k: int, target_g: float | None, *, seed: int, tolerance: float = 0.02
) -> Floats:
    """A fixed bias (E,) on the router's logits with which top-``k`` routing reaches skewness ``target_g`` on these
    tokens.

    The bias is a ramp from 0 to 1 in an order drawn from ``seed``, times a strength that is bisected. ``None``
    (uniform) returns zeros: the router as it is. Raises ``IsthmusError`` if the router alone is more uneven than the
    target, if the target is out of reach (with k choices per token at most 1 ÷ k), or if these tokens are too few to
    come within ``tolerance``.
    """
    logits = np.asarray(logits_TE, dtype=np.float64)
    num_experts = logits.shape[1]
    if target_g is None:
        return np.zeros(num_experts)

    def reached(bias_E: Floats) -> float:
        return skewness([routed_counts(logits + bias_E, top_k)])

    lowest = reached(np.zeros(num_experts))
    if not lowest - tolerance <= target_g <= 1 / top_k:
        raise IsthmusError(
            f"skew: got {target_g}, wanted between {lowest:.4f}, what this router reaches without a bias (ask for "
            f"uniform to keep that), and {1 / top_k:.4f}, when all tokens choose the same {top_k} experts"
        )
    ramp_E = np.random.default_rng(seed).permutation(num_experts) / max(1, num_experts - 1)
    # With biases further apart than any two logits of a token, all tokens choose the same experts.
    strongest = 2 * num_experts * max(1e-6, float(np.ptp(logits, axis=1).max()))
    low, high = 0.0, strongest
    best_E, best_gap = np.zeros(num_experts), abs(lowest - target_g)
    for strength in (strongest, *[None] * NUM_BISECTIONS):
        bias_E = ramp_E * (strength or (low + high) / 2)
        g = reached(bias_E)
        if abs(g - target_g) < best_gap:
            best_E, best_gap = bias_E, abs(g - target_g)
        if strength is None:
            low, high = ((low + high) / 2, high) if g < target_g else (low, (low + high) / 2)
    if best_gap > tolerance:
        raise IsthmusError(
            f"skew: got {target_g}, came within {best_gap:.3f} of it with {len(logits)} tokens, wanted {tolerance}; "
            "give more tokens"
        )
    return best_E
