"""One request on emulated weak devices: every strategy over bandwidth and number of devices, beside the prediction.

Raises testbeds (root, see `isthmus testbed`), and on each runs `isthmus bench infer` with our transport and, as the
baseline, tensor parallelism alone with FP32 on the wire over gloo: the stand-in for what is usually written. The model
is BERT-base with random weights, which is as fast as with trained ones. What has a report already is not measured again
unless --again is given, so a sweep can be stopped and continued.

    sudo python benchmarks/infer_testbed.py --output out/infer [--devices 1,2,3,4] [--bandwidths 1000,125]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from testbed_runs import random_bert_base, run_once, write_results

from isthmus.spec.report import BenchInferReport, BenchInferRow
from isthmus.spec.serialization import from_json
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed import Testbed

BANDWIDTHS = "1000,500,250,125,50,25"
BASELINE = "tensor parallel, FP32 over gloo"
_ISTHMUS = str(Path(sys.executable).parent / "isthmus")


def main() -> None:
    arguments = parse_arguments()
    model = arguments.model or random_bert_base(arguments.output / "bert-base-random")
    cells: list[dict[str, Any]] = []
    for num_devices in map(int, arguments.devices.split(",")):
        device = DeviceSpec(cpu_share=arguments.cpu, bandwidth_bits_per_s=1e9)
        spec = TestbedSpec(name=arguments.name, devices=(device,) * num_devices)
        with Testbed.up(spec) as testbed:
            # Alone there is no link: one bandwidth stands for all.
            for mbit in [int(part) for part in arguments.bandwidths.split(",")][: None if num_devices > 1 else 1]:
                testbed.set_bandwidth(mbit)
                cells.append(measure_cell(testbed, arguments, model, num_devices, mbit))
                print_cell(cells[-1])
    text = markdown(cells, arguments)
    write_results(arguments.output, "infer_testbed", text, {"ratios": ratios(cells), "cells": cells})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for reports, table and the random model")
    parser.add_argument("--devices", default="1,2,3,4")
    parser.add_argument("--bandwidths", default=BANDWIDTHS, help="Mbit/s")
    parser.add_argument("--cpu", type=float, default=0.45, help="cores of each device")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--codecs", default="fp32,int8")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--model", type=Path, help="checkpoint directory instead of the random one")
    parser.add_argument("--name", default="inferbench", help="of the testbed")
    parser.add_argument("--again", action="store_true", help="measure cells whose report is there too")
    return parser.parse_args()


def measure_cell(
    testbed: Testbed, arguments: argparse.Namespace, model: Path, num_devices: int, mbit: int
) -> dict[str, Any]:
    """Reports of one number of devices at one bandwidth."""
    folder = arguments.output / f"{num_devices}-devices-{mbit}-mbit"
    # Measured anew in each cell: a host's other work comes and goes.
    runs = {"ours": ["--strategies", "all", "--codecs", arguments.codecs, "--refresh"]}
    if num_devices > 1:
        runs["gloo"] = ["--strategies", "tensor", "--codecs", "fp32", "--transport", "gloo"]
    found: dict[str, Any] = {"num_devices": num_devices, "bandwidth_bits_per_s": mbit * 1e6}
    for name, options in runs.items():
        report = folder / name / "report.json"
        command = [_ISTHMUS, "bench", "infer", str(model), *options, "--report", str(report)]
        command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
        cache = arguments.output / "cache"
        found[name] = run_once(testbed, command, report, cache=cache, again=arguments.again)["rows"]
    return found


def rows_of(cell: dict[str, Any], name: str = "ours") -> list[BenchInferRow]:
    content = {"schema_version": 1, "config": {}, "environment": {}, "rows": cell.get(name, [])}
    return list(from_json(BenchInferReport, json.dumps(content)).rows)


def choice_of(cell: dict[str, Any]) -> BenchInferRow:
    return next(row for row in rows_of(cell) if row.is_choice)


def best_of(
    cell: dict[str, Any], strategy: str | None = None, codec: str = "fp32", name: str = "ours"
) -> BenchInferRow:
    """The fastest measured one of these."""
    rows = [row for row in rows_of(cell, name) if row.codec == codec and strategy in (None, row.strategy)]
    return min(rows, key=lambda row: row.latency_s.median)


def ratios(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the issue asks for, of the cells that there are. ``exact``: FP32 on the wire and in the arithmetic."""
    found: dict[str, Any] = {"baseline_over_choice": {}, "single_over_choice": {}, "bound_share": {}}
    errors, hits = [], 0
    for cell in cells:
        name = f"{cell['num_devices']} devices, {cell['bandwidth_bits_per_s'] / 1e6:.0f} Mbit/s"
        choice, best = choice_of(cell), best_of(cell)
        if cell["num_devices"] > 1:
            baseline = best_of(cell, "tensor", name="gloo")
            found["baseline_over_choice"][name] = baseline.latency_s.median / choice.latency_s.median
        found["single_over_choice"][name] = best_of(cell, "single").latency_s.median / choice.latency_s.median
        found["bound_share"][name] = choice.bound_s / choice.latency_s.median
        errors += [abs(row.predicted_latency_s / row.latency_s.median - 1) for row in rows_of(cell)]
        hits += choice.latency_s.median <= 1.05 * best.latency_s.median
    found["median_prediction_error"] = statistics.median(errors)
    found["share_of_cells_where_the_choice_is_within_5_percent_of_the_best"] = hits / len(cells)
    return found


def describe(row: BenchInferRow) -> str:
    return f"{row.strategy} on {row.num_devices}" if row.num_devices > 1 else row.strategy


def markdown(cells: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    lines = [
        f"Seconds are medians of {arguments.repeats} requests of {arguments.tokens} tokens, all plans in turns; "
        f"devices of {arguments.cpu:g} core. *Choice* is the planner's with FP32 on the wire; baseline: {BASELINE}.",
        "",
        "| devices | Mbit/s | one device s | baseline s | choice | bound s | choice s (p10–p90) | of bound | "
        "predicted s | off by | baseline ÷ choice | one ÷ choice | fastest s | fastest int8 wire s |",
        "|---|" + "---|" * 13,
    ]
    for cell in cells:
        choice, best, single = choice_of(cell), best_of(cell), best_of(cell, "single")
        spread, median = choice.latency_s, choice.latency_s.median
        baseline_s = best_of(cell, "tensor", name="gloo").latency_s.median if cell["num_devices"] > 1 else None
        int8 = [row.latency_s.median for row in rows_of(cell) if row.codec == "int8"]
        cells_of_row = [
            str(cell["num_devices"]),
            f"{cell['bandwidth_bits_per_s'] / 1e6:.0f}" if cell["num_devices"] > 1 else "any",
            f"{single.latency_s.median:.3f}",
            "–" if baseline_s is None else f"{baseline_s:.3f}",
            describe(choice),
            f"{choice.bound_s:.3f}",
            f"{median:.3f} ({spread.p10:.3f}–{spread.p90:.3f})",
            f"{choice.bound_s / median:.2f}",
            f"{choice.predicted_latency_s:.3f}",
            f"{choice.predicted_latency_s / median - 1:+.0%}",
            "–" if baseline_s is None else f"{baseline_s / median:.2f}",
            f"{single.latency_s.median / median:.2f}",
            f"{best.latency_s.median:.3f} ({describe(best)})",
            f"{min(int8):.3f}" if int8 else "–",
        ]
        lines.append(f"| {' | '.join(cells_of_row)} |")
    found = ratios(cells)
    lines += [
        "",
        f"Median error of all predictions {found['median_prediction_error']:.0%}; the choice is the fastest exact plan "
        "or within 5 % of it in "
        f"{found['share_of_cells_where_the_choice_is_within_5_percent_of_the_best']:.0%} of the cells.",
        "",
    ]
    return "\n".join(lines)


def print_cell(cell: dict[str, Any]) -> None:
    for name in ("ours", "gloo"):
        for row in rows_of(cell, name):
            share = row.bound_s / row.latency_s.median
            print(
                f"{cell['num_devices']} devices {cell['bandwidth_bits_per_s'] / 1e6:.0f} Mbit/s {name} {describe(row)} "
                f"{row.codec}{' (choice)' if row.is_choice else ''}: bound {row.bound_s:.3f} s, "
                f"{row.latency_s.median:.3f} s [{row.latency_s.p10:.3f}, {row.latency_s.p90:.3f}], {share:.0%} of the "
                f"bound, predicted {row.predicted_latency_s:.3f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
