"""Owns the heat map of expert popularity: which experts of which layer the tokens chose, and how skewed that is.

Legend: ``L`` Mixture-of-Experts layers, ``E`` experts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.reporting.canvas import INK, MUTED, draw_title, new_figure, quiet_axes, write_png


def popularity_skew(shares_LE: np.ndarray) -> np.ndarray:
    """G of each layer, shape (L,): the sum over experts of squared shares of tokens. 1/E when uniform, 1 when one
    expert has all.

    (APTMoE, evaluation; the paper's G is the mean of these over layers.)
    """
    return (shares_LE**2).sum(axis=1)


def plot_popularity(
    counts: Mapping[int, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    title: str = "Expert popularity",
) -> None:
    """Writes the heat map (PNG): share of tokens by layer and expert, G per layer at the right, mean G in the subtitle.

    ``counts`` holds the tokens (or shares) of each expert by layer; the rows keep its order. Raises ``ValueError``
    unless every layer has tokens, none negative, and all have as many experts. Blocks.
    """
    shares_LE = _shares(counts)
    skew_L = popularity_skew(shares_LE)
    num_layers, num_experts = shares_LE.shape
    names = [str(layer) for layer in counts]

    cell_in = min(0.5, 10.0 / num_experts)
    width_in = max(3.2, cell_in * num_experts)
    height_in = max(1.2, num_layers * min(0.42, max(0.16, 4.0 / num_layers)))
    left, right, top, bottom = 0.9, 2.6, 0.95, 0.65
    figure = new_figure(left + width_in + right, top + height_in + bottom)
    total_w, total_h = left + width_in + right, top + height_in + bottom
    axes = figure.add_axes((left / total_w, bottom / total_h, width_in / total_w, height_in / total_h))
    image = axes.imshow(shares_LE * 100, cmap="YlGnBu", vmin=0.0, aspect="auto", interpolation="nearest")
    _label_rows_and_columns(axes, names, num_experts)
    if cell_in >= 0.34 and height_in / num_layers >= 0.2:
        _write_cells(axes, shares_LE)
    skews = figure.add_axes(((left + width_in + 0.15) / total_w, bottom / total_h, 1.0 / total_w, height_in / total_h))
    _draw_skew(skews, skew_L, num_experts)
    bar = figure.add_axes(((left + width_in + 1.55) / total_w, bottom / total_h, 0.13 / total_w, height_in / total_h))
    figure.colorbar(image, cax=bar)
    bar.tick_params(length=0, labelsize=8, colors=MUTED)
    bar.set_ylabel("% of the layer's choices", fontsize=8, color=MUTED)
    bar.spines["outline"].set_visible(False)

    draw_title(figure, left / total_w, 1 - 0.36 / total_h, title)
    facts = f"mean G = {skew_L.mean():.3f}  (uniform would be {1 / num_experts:.3f})"
    figure.text(left / total_w, 1 - 0.63 / total_h, facts, fontsize=9.5, color=MUTED)
    write_png(figure, path)


def _shares(counts: Mapping[int, Sequence[float]]) -> np.ndarray:
    """Shares of each layer's tokens, shape (L, E)."""
    lengths = sorted({len(counts_E) for counts_E in counts.values()})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"counts has layers with {lengths or 'no'} experts, wanted at least one layer and the same number in each: "
            "plot layers with different numbers of experts one group at a time"
        )
    table_LE = np.asarray([list(counts_E) for counts_E in counts.values()], dtype=np.float64)
    if not np.isfinite(table_LE).all() or (table_LE < 0).any():
        raise ValueError("counts has negative or non-finite numbers, wanted numbers of tokens")
    totals_L1 = table_LE.sum(axis=1, keepdims=True)
    empty = [layer for layer, total in zip(counts, totals_L1[:, 0], strict=True) if total == 0]
    if empty:
        raise ValueError(
            f"counts has no tokens in layers {empty}, wanted some in each: leave out layers that did not run"
        )
    return table_LE / totals_L1


def _label_rows_and_columns(axes: Any, names: Sequence[str], num_experts: int) -> None:
    quiet_axes(axes)
    for side in axes.spines.values():
        side.set_visible(False)
    every_row = -(-len(names) // 32)
    every_column = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if num_experts / step <= 32)
    axes.set_yticks(range(0, len(names), every_row), names[::every_row], fontsize=8)
    axes.set_xticks(range(0, num_experts, every_column))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("layer", fontsize=9, color=MUTED)
    axes.set_xlabel("expert", fontsize=9, color=MUTED)


def _write_cells(axes: Any, shares_LE: np.ndarray) -> None:
    middle = shares_LE.max() / 2
    for (layer, expert), share in np.ndenumerate(shares_LE):
        colour = "white" if share > middle else INK
        axes.text(expert, layer, f"{share * 100:.0f}", ha="center", va="center", fontsize=7.5, color=colour)


def _draw_skew(axes: Any, skew_L: np.ndarray, num_experts: int) -> None:
    """G of each layer as a bar beside its row, with the number where rows are high enough; a line where uniform would
    be."""
    rows = np.arange(len(skew_L))
    axes.barh(rows, skew_L, height=0.7, color="#9db4c8")
    axes.axvline(1 / num_experts, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_ylim(len(skew_L) - 0.5, -0.5)
    axes.set_xlim(0, max(skew_L.max() * 1.45, 1.3 / num_experts))
    every = -(-len(skew_L) // 32)
    digits = 2 if skew_L.max() >= 0.1 else 3
    for row in rows[::every]:
        axes.text(skew_L[row], row, f" {skew_L[row]:.{digits}f}", va="center", fontsize=7, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("G", fontsize=9, color=MUTED, loc="left", pad=4)
