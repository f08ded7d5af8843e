"""Layers that differ only in how their tokens are spread, decided on together: each as it would be alone
(``equation_one.py``, ``horizon.py``; the tests compare), many times as fast.

Legend: ``L`` layers, ``E`` experts, ``K`` = E + 1 numbers of experts on the accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AlikeLayers:
    """The fields are those of ``LayerProblem``; nothing is on the accelerator yet, and everything fits it."""

    counts_LE: Floats
    """Whole tokens."""
    cpu_s_LE: Floats
    accelerator_s_LE: Floats
    load_s: float
    unload_s: float
    token_h2d_s: float
    token_d2h_s: float
    dense_s: float
    dense_load_s: float


def equation_one_of_each(layers: AlikeLayers) -> list[frozenset[int]]:
    """(L,) experts that Equation 1 gives to the accelerator, as ``equation_one_experts``."""
    counts_LE = layers.counts_LE
    num_layers, num_experts = counts_LE.shape
    walk_LE = np.argsort(counts_LE, axis=1, kind="stable")
    rows_L1 = np.arange(num_layers)[:, None]
    is_used_LE = counts_LE[rows_L1, walk_LE] > 0
    cpu_s_LE = np.where(is_used_LE, layers.cpu_s_LE[rows_L1, walk_LE], 0.0).cumsum(axis=1)
    loads_s_E = layers.dense_load_s + np.arange(num_experts, 0, -1) * layers.load_s
    goes_LE = is_used_LE & (cpu_s_LE >= loads_s_E)
    first_L = np.where(goes_LE.any(axis=1), goes_LE.argmax(axis=1), num_experts)
    return [frozenset(walk[first:]) for walk, first in zip(walk_LE.tolist(), first_L.tolist(), strict=True)]


def cheapest_of_each(layers: AlikeLayers, price: float, *, cpu_weight: float = 1.0) -> list[frozenset[int]]:
    """(L,) the most popular experts whose loading makes layer seconds + ``price`` × link seconds least, as
    ``ChoiceTable``. ``cpu_weight``: what a second of the CPU counts for."""
    counts_LE = layers.counts_LE
    num_layers, num_experts = counts_LE.shape
    is_used_LE = counts_LE > 0
    cpu_s_LE = np.where(is_used_LE, cpu_weight * layers.cpu_s_LE, 0.0)
    ranked_LE = np.lexsort((-layers.accelerator_s_LE, -counts_LE), axis=1)
    rows_L1 = np.arange(num_layers)[:, None]

    def on_LK(values_LE: Floats) -> Floats:
        """Sums over the first k in the order of popularity."""
        ranked = np.where(is_used_LE, values_LE, 0.0)[rows_L1, ranked_LE]
        return np.concatenate([np.zeros((num_layers, 1)), ranked.cumsum(axis=1)], axis=1)

    tokens_LK = counts_LE.sum(axis=1)[:, None] - on_LK(counts_LE)
    num_on_K = np.arange(num_experts + 1)
    travel_LK = tokens_LK * (layers.token_d2h_s + layers.token_h2d_s)
    # Summed in the order of experts: to the last bit what adding them one by one gives.
    cpu_LK = cpu_s_LE.cumsum(axis=1)[:, -1:] - on_LK(cpu_s_LE)
    layer_LK = layers.dense_s + np.maximum(cpu_LK + travel_LK, on_LK(layers.accelerator_s_LE))
    up_LK = num_on_K * layers.load_s + tokens_LK * layers.token_h2d_s
    down_LK = num_on_K * layers.unload_s + tokens_LK * layers.token_d2h_s
    cost_LK = layer_LK + price * np.maximum(up_LK, down_LK)
    cost_LK[num_on_K > is_used_LE.sum(axis=1)[:, None]] = np.inf
    num_L = cost_LK.argmin(axis=1)
    return [frozenset(ranked[:num]) for ranked, num in zip(ranked_LE.tolist(), num_L.tolist(), strict=True)]
