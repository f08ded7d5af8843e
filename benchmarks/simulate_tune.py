"""APTMoE's published figures beside the same simulated, and our policy beside the published rule.

    ISTHMUS_SHARED=DIR python benchmarks/simulate_tune.py [--only S-16]

Experts' seconds are those of the published table in DIR/data/a800_xeon6348_expert_profile.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.curves import monotone
from isthmus.simulation.tuning.clusters import TABLE_NUM_CORES, a800
from isthmus.simulation.tuning.published import CELLS, FIGURES, Cell, CellSeconds, simulate_cell, simulated_ratio
from isthmus.spec.profile import Curve
from isthmus.spec.tune_cluster import MeasuredExperts, TuneCluster

TABLE = "data/a800_xeon6348_expert_profile.json"
SHAPES = {"S": "h1024-i4096-mlp", "M": "h2048-i8192-mlp", "L": "h4096-i14336-mlp"}
NEIGHBOURS = 3
"""Rows to either side whose median stands for a count: single rows jump by a factor of two."""


def measured_experts(path: Path) -> dict[str, MeasuredExperts]:
    """The table on a geometric grid, never falling."""
    found = {}
    for size, model in json.loads(path.read_text())["models"].items():
        seconds = np.array(model["cpu_expert_forward_s"])
        counts = sorted({round(2 ** (step / 2)) for step in range(2 * int(np.log2(len(seconds) - 1)) + 1)})
        medians = [float(np.median(seconds[max(1, n - NEIGHBOURS) : n + NEIGHBOURS + 1])) for n in counts]
        found[SHAPES[size]] = MeasuredExperts(
            cpu_forward=monotone(Curve(num_tokens=tuple(counts), seconds=tuple(medians))),
            num_cores=TABLE_NUM_CORES,
            load_s=model["load_expert_s"],
            dense_load_s=model["load_attention_s"] + model["load_gate_s"]["16"],
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="configurations of this model only")
    arguments = parser.parse_args()
    shared = os.environ.get("ISTHMUS_SHARED")
    if shared is None or not (Path(shared) / TABLE).is_file():
        sys.exit(f"ISTHMUS_SHARED: got {shared}, wanted a directory with {TABLE}")
    experts = measured_experts(Path(shared) / TABLE)

    def cluster(cell: Cell) -> TuneCluster:
        return replace(a800(cell.at_one_processor, cell.num_devices), experts=experts)

    chosen = [cell for cell in CELLS if arguments.only in (None, cell.model)]
    cells: dict[Cell, CellSeconds] = {}
    for number, cell in enumerate(chosen):
        began_s = time.perf_counter()
        cells[cell] = simulate_cell(cell, cluster(cell))
        took_s = time.perf_counter() - began_s
        print(f"{number + 1} of {len(chosen)}: {cell.name}, {took_s:.0f} s", file=sys.stderr, flush=True)
    print_figures(cells)
    print_ours(cells)


def print_figures(cells: dict[Cell, CellSeconds]) -> None:
    print("| figure | configuration | published | simulated | deviation |\n|---|---|---:|---:|---:|")
    for figure in FIGURES:
        if figure.cell in cells:
            simulated = simulated_ratio(figure, cells)
            deviation = simulated / figure.published - 1
            print(
                f"| {figure.what} | {figure.cell.name} | {figure.published:.3f} | {simulated:.3f} | {deviation:+.0%} |"
            )


def print_ours(cells: dict[Cell, CellSeconds]) -> None:
    """rule*: the published rule at the number of stages that suits it best. rule†: likewise in our runtime, which
    copies in pieces and whose optimizer overlaps the next step. Bounds: of any step that loads its weights, and of any
    that waits for the norm of all gradients. Shares of them: the first times the bubble factor; the second as it is,
    and with the pipeline's filling and draining."""
    names = ("bound, s", "norm's", "gpipe-offload", "mobius", "rule", "rule*", "rule†", "ours")
    ratios = ("ours ÷ rule", "÷ rule*", "÷ rule†", "÷ mobius", "of bound × bubbles", "of norm's", "filled")
    print(f"\n| configuration | {' | '.join((*names, *ratios))} | ours takes |")
    print(f"|---|{'---:|' * (len(names) + len(ratios))}---|")
    rows = []
    for cell, s in cells.items():
        others = (s.aptmoe_s, s.best_aptmoe_s, s.runtime_aptmoe_s, s.mobius_s)
        bounds = (s.bound_s * s.bubble_factor, s.norm_bound_s, s.filled_bound_s, s.bound_s)
        rows.append([value / s.affinity_s for value in (*others, *bounds)])
        times = (s.bound_s, s.norm_bound_s, s.gpipe_offload_s, s.mobius_s, s.aptmoe_s, s.best_aptmoe_s)
        printed = [f"{value:.2f}" for value in (*times, s.runtime_aptmoe_s, s.affinity_s, *rows[-1][:4])]
        printed += [f"{share:.0%}" for share in rows[-1][4:7]]
        print(f"| {cell.name} | {' | '.join(printed)} | {s.plan} |")
    rule, best, runtime, mobius, with_bubbles, of_norm, filled, share = np.array(rows).T
    figures = [figure for figure in FIGURES if figure.cell in cells]
    logs = np.log([simulated_ratio(figure, cells) / figure.published for figure in figures])
    summary = {
        "figures": len(logs),
        "figures_within_10_percent": int((np.abs(logs) <= np.log(1.1)).sum()),
        "rms_log_deviation": float(np.sqrt(np.mean(np.square(logs)))),
        "ours_by_rule_geometric_mean": geometric_mean(rule),
        "ours_by_rule_at_its_best_stages_geometric_mean": geometric_mean(best),
        "ours_by_rule_in_our_runtime_geometric_mean": geometric_mean(runtime),
        "ours_by_mobius_least": float(mobius.min()),
        "bound_share_with_bubble_mean": float(with_bubbles.mean()),
        "bound_share_mean": float(share.mean()),
        "norm_bound_share_mean": float(of_norm.mean()),
        "norm_bound_share_geometric_mean": geometric_mean(of_norm),
        "norm_bound_share_filled_mean": float(filled.mean()),
    }
    print(json.dumps({name: round(value, 4) for name, value in summary.items()}))


def geometric_mean(values: NDArray[np.float64]) -> float:
    return float(np.exp(np.mean(np.log(values))))


if __name__ == "__main__":
    main()
