"""What ``decoupled_testbed.py`` found, as tables and as the numbers that are wanted, those beside them."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from overlap_tables import overlap_numbers, overlap_text
from table_parts import median, name_of, row_of, table, with_spread

WANTED_BASELINE = {1000: 1.7, 200: 2.6, 125: 3.3, 50: 6.0}
"""Times as fast as the stand-in for tensor parallelism, by Mbit/s."""
WANTED_ALONE = {1000: 0.30, 250: 0.32, 125: 0.34, 50: 0.38}
"""Of one device's time with the ordinary model."""
WANTED_BOUND, BOUND_FROM_MBIT = 0.75, 125
WANTED_HITS, WANTED_ERROR, NEAR = 0.9, 0.15, 1.05
WANTED_TOKEN, WANTED_UNEVEN = 0.5, 1.5
WANTED_EXACT, WANTED_COSINE = 1e-5, 0.9995


# --- latency ----------------------------------------------------------------------------------------------------------


def latency_numbers(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bandwidth and codec: ratios to one device with the ordinary model, and to either baseline, and the share of
    the bound."""
    numbers = []
    for cell in cells:
        alone_s = median(row_of(cell, "one device plain fp32"))
        for codec in ("fp32", "int8"):
            row = row_of(cell, f"planned decoupled fp32 {codec}")
            ours_s = median(row)
            numbers.append(
                {
                    "mbit_per_s": cell["mbit_per_s"],
                    "codec": codec,
                    "baseline_over_ours": median(row_of(cell, "gloo")) / ours_s,
                    "own_baseline_over_ours": median(row_of(cell, "gloo-own")) / ours_s,
                    "wanted_baseline": WANTED_BASELINE.get(cell["mbit_per_s"]),
                    "ours_over_one": ours_s / alone_s,
                    "wanted_one": WANTED_ALONE.get(cell["mbit_per_s"]),
                    "bound_share": row["bound_s"] / ours_s,
                    "wanted_bound_share": WANTED_BOUND if cell["mbit_per_s"] <= BOUND_FROM_MBIT else None,
                    "prediction_error": row["predicted_latency_s"] / ours_s - 1,
                }
            )
    return numbers


def latency_text(cells: list[dict[str, Any]], arguments: Namespace) -> str:
    numbers = {(each["mbit_per_s"], each["codec"]): each for each in latency_numbers(cells)}
    names = ["Mbit/s", "wire", "bound s", "predicted s", "plan", "measured s (p10–p90)", "off by", "of bound (wanted)"]
    names += ["one device s", "one, decoupled s", "÷ one (wanted)", "TP over gloo s", "gloo's own sums s"]
    names += ["TP ÷ ours (wanted)", "own sums ÷ ours"]
    rows = []
    for cell in cells:
        for codec in ("fp32", "int8"):
            row, each = row_of(cell, f"planned decoupled fp32 {codec}"), numbers[cell["mbit_per_s"], codec]
            rows.append(
                [
                    cell["mbit_per_s"],
                    codec,
                    f"{row['bound_s']:.3f}",
                    f"{row['predicted_latency_s']:.3f}",
                    name_of(row["plan"]),
                    with_spread(row["latency_s"]),
                    f"{each['prediction_error']:+.0%}",
                    f"{each['bound_share']:.2f} ({_wanted('≥', each['wanted_bound_share'])})",
                    f"{median(row_of(cell, 'one device plain fp32')):.3f}",
                    f"{median(row_of(cell, 'one device decoupled fp32')):.3f}",
                    f"{each['ours_over_one']:.2f} ({_wanted('≤', each['wanted_one'])})",
                    f"{median(row_of(cell, 'gloo')):.3f}",
                    f"{median(row_of(cell, 'gloo-own')):.3f}",
                    f"{each['baseline_over_ours']:.2f} ({_wanted('≥', each['wanted_baseline'])})",
                    f"{each['own_baseline_over_ours']:.2f}",
                ]
            )
    lines = [
        "## One request, by bandwidth",
        "",
        f"The decoupled BERT-base shape under the planner's choice, {arguments.tokens} tokens, four devices of "
        f"{arguments.cpu:g} core; *one device* has the ordinary BERT-base, *TP over gloo* divides it with FP32 on the "
        "wire under our collectives, *gloo's own sums* with gloo's. All in turns; medians.",
        "",
        *table(names, rows),
    ]
    return "\n".join(lines)


def _wanted(sign: str, value: float | None) -> str:
    return "–" if value is None else f"{sign} {value:g}"


# --- the planner's grid -----------------------------------------------------------------------------------------------


def grid_numbers(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all cells: how often the choice is the fastest or near it, and how far off predictions are."""
    rows = [cell for found in cells for cell in grid_cells(found)]
    hits = [cell["ratio"] <= NEAR and cell["choice_fits"] for cell in rows]
    errors = [abs(row["predicted_latency_s"] / median(row) - 1) for found in cells for row in found["rows"]]
    return {
        "num_cells": len(rows),
        "num_choices_that_do_not_fit": sum(not cell["choice_fits"] for cell in rows),
        "share_within_5_percent_of_the_best": sum(hits) / len(hits) if hits else None,
        "share_at_first": sum(cell["first_ratio"] <= NEAR for cell in rows) / len(rows) if rows else None,
        "wanted_share": WANTED_HITS,
        "mean_ratio_to_the_best": statistics.fmean(cell["ratio"] for cell in rows) if rows else None,
        "num_predictions": len(errors),
        "median_prediction_error": statistics.median(errors) if errors else None,
        "wanted_prediction_error": WANTED_ERROR,
    }


def grid_cells(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of one number of devices and bandwidth: the choice, settled and at first, beside the one that was the fastest of
    all that fit, as timed in turns with it afterwards."""
    for cell in found["cells"]:
        rows = [row for row in found["rows"] if row["tokens"] == cell["tokens"] and row["plan"] in cell["fitting"]]
        finals = cell["finals"]
        choice, first = (
            next(row for row in finals if row["plan"] == cell[name]) for name in ("choice", "first_choice")
        )
        best = min(finals, key=median)
        ratios = {"ratio": median(choice) / median(best), "first_ratio": median(first) / median(best)}
        yield {**cell, **ratios, "choice": choice, "best": best, "num_timed": len(rows)}


def grid_text(cells: list[dict[str, Any]], arguments: Namespace) -> str:
    names = [
        "devices",
        "Mbit/s",
        "memory",
        "tokens",
        "choice",
        "bound s",
        "predicted s",
        "measured s (p10–p90)",
        "off by",
    ]
    names += ["fastest", "its s", "choice ÷ fastest", "at first", "requests", "resident", "timed"]
    rows = []
    for found in cells:
        for cell in grid_cells(found):
            choice, best = cell["choice"], cell["best"]
            off = choice["predicted_latency_s"] / median(choice) - 1
            rows.append(
                [
                    found["num_devices"],
                    found["mbit_per_s"],
                    cell["memory"],
                    cell["tokens"],
                    name_of(choice["plan"]),
                    f"{choice['bound_s']:.3f}",
                    f"{choice['predicted_latency_s']:.3f}",
                    with_spread(choice["latency_s"]),
                    f"{off:+.0%}",
                    name_of(best["plan"]),
                    f"{median(best):.3f}",
                    f"{cell['ratio']:.2f}",
                    f"{cell['first_ratio']:.2f}",
                    len(cell["answered"]["plans"]),
                    cell["num_resident"],
                    cell["num_timed"],
                ]
            )
    numbers = grid_numbers(cells)
    lines = [
        "## The planner over bandwidth, tokens, devices and memory",
        "",
        "*Choice* is the runtime planner's among the plans that the static one keeps for requests of 128 tokens, "
        "after it has answered some *requests*, and *at first*, by predictions alone; timed beside it is the "
        f"fastest of every kind (number of devices, ways of original layers) predicted within "
        f"{arguments.within:g} times the fastest. The one that was fastest so and both choices were timed again, in "
        f"turns: seconds are those. FP32 on the wire. *Tight* memory is {arguments.tight:g} of all "
        "weights, beside the process.",
        "",
        *table(names, rows),
    ]
    if rows:
        lines += [
            f"Of {numbers['num_cells']} cells the choice is the fastest measured or within 5 % of it in "
            f"{numbers['share_within_5_percent_of_the_best']:.0%} (wanted {WANTED_HITS:.0%}), at first in "
            f"{numbers['share_at_first']:.0%}; the median of "
            f"{numbers['num_predictions']} predictions is off by {numbers['median_prediction_error']:.0%} (wanted "
            f"{WANTED_ERROR:.0%}). {numbers['num_choices_that_do_not_fit']} choices take more memory than there is.",
            "",
        ]
    return "\n".join(lines)


# --- the others -------------------------------------------------------------------------------------------------------


def generation_numbers(found: dict[str, Any]) -> dict[str, float]:
    """Time per token of block parallelism, by that of our own tensor parallelism, by dtype."""
    return {
        dtype: row_of(found, f"planned decoupled {dtype} fp32")["time_per_token_s"]["median"]
        / row_of(found, f"tensor plain {dtype}")["time_per_token_s"]["median"]
        for dtype in found["job"]["dtypes"]
    }


def generation_text(found: dict[str, Any], arguments: Namespace) -> str:
    num_later = found["job"]["new_tokens"] - 1
    rows = []
    for row in found["rows"]:
        predicted_s = (row["predicted_latency_s"] - row["predicted_first_token_s"]) / num_later
        rows.append(
            [
                row["label"],
                name_of(row["plan"]),
                f"{predicted_s * 1e3:.2f}",
                with_spread(row["time_per_token_s"], 1e3, 2),
                f"{predicted_s / row['time_per_token_s']['median'] - 1:+.0%}",
                with_spread(row["time_to_first_token_s"], 1e3, 0),
            ]
        )
    ratios = ", ".join(f"{dtype} {ratio:.2f}" for dtype, ratio in generation_numbers(found).items())
    lines = [
        "## Tokens",
        "",
        f"A Llama of 134M parameters, a prompt of 64 tokens continued by {arguments.new_tokens}, four devices, 125 "
        f"Mbit/s. Block parallelism ÷ our own tensor parallelism, time per token: {ratios} (wanted ≤ {WANTED_TOKEN}).",
        "",
        *table(["", "plan", "predicted ms", "ms a token (p10–p90)", "off by", "first token ms"], rows),
    ]
    return "\n".join(lines)


def uneven_numbers(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times as fast the planned placement is, by codec: as the even ones of the same model, and with slices in
    proportion to the devices as the even one of even slices."""
    numbers = {}
    for codec in found["job"]["codecs"]:
        planned_s = median(row_of(found, f"planned decoupled fp32 {codec}"))
        gather_s = median(row_of(found, f"even, gather decoupled fp32 {codec}"))
        numbers[codec] = {
            "over_even_gather": gather_s / planned_s,
            "over_even_best_ways": median(row_of(found, f"even, best ways decoupled fp32 {codec}")) / planned_s,
            "uneven_slices_over_even_gather": gather_s / median(row_of(found, f"planned uneven slices fp32 {codec}")),
        }
    return numbers


def uneven_text(found: dict[str, Any], arguments: Namespace) -> str:
    rows = [
        [
            row["label"],
            name_of(row["plan"]),
            ",".join(map(str, row["plan"]["devices"])),
            f"{row['bound_s']:.3f}",
            f"{row['predicted_latency_s']:.3f}",
            with_spread(row["latency_s"]),
            f"{row['predicted_latency_s'] / median(row) - 1:+.0%}",
        ]
        for row in found["rows"]
    ]
    numbers = "; ".join(
        f"{codec} {each['over_even_gather']:.2f} × the even placement as published, "
        f"{each['over_even_best_ways']:.2f} × with the best ways of original layers"
        for codec, each in uneven_numbers(found).items()
    )
    lines = [
        "## Uneven devices",
        "",
        f"Devices of {arguments.uneven} core, links of {arguments.uneven_mbit:g} Mbit/s and 25 at device "
        f"{arguments.slow_link}, {arguments.tokens} tokens. *Uneven slices*: a model decoupled for these devices. "
        f"Planned: {numbers} (wanted ≥ {WANTED_UNEVEN:g}).",
        "",
        *table(["", "plan", "devices", "bound s", "predicted s", "measured s (p10–p90)", "off by"], rows),
    ]
    return "\n".join(lines)


def drop_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Plans and latencies before, in the first request after, and in those that follow."""
    number = found["job"]["drop_before"]
    before, first, later = found["rows"][:number], found["rows"][number], found["rows"][number + 1 :]
    changed = [row["name"] for row in later] and later[0]["plan"] != before[-1]["plan"]
    return {
        "plan_before": before[-1]["name"],
        "median_before_s": statistics.median(row["latency_s"] for row in before),
        "first_after_plan": first["name"],
        "first_after_s": first["latency_s"],
        "plan_later": later[-1]["name"],
        "median_later_s": statistics.median(row["latency_s"] for row in later),
        "changed_at_the_next_request": bool(changed),
    }


def drop_text(found: dict[str, Any], arguments: Namespace) -> str:
    numbers = drop_numbers(found)
    before, after = found["job"]["mbit_per_s"]
    rows = [[place, row["name"], f"{row['latency_s']:.3f}"] for place, row in enumerate(found["rows"])]
    lines = [
        "## Links that drop to a tenth",
        "",
        f"From {before:g} to {after:g} Mbit/s before request {found['job']['drop_before']}: {numbers['plan_before']}, "
        f"{numbers['median_before_s']:.3f} s; the first request after it {numbers['first_after_s']:.3f} s; then "
        f"{numbers['plan_later']}, {numbers['median_later_s']:.3f} s. "
        + ("The next request's plan is another." if numbers["changed_at_the_next_request"] else "The plan stays."),
        "",
        *table(["request", "plan", "s"], rows),
    ]
    return "\n".join(lines)


def exact_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """The worst of all ways, by codec."""
    numbers = {}
    for codec in found["job"]["codecs"]:
        rows = [row for row in found["rows"] if row["codec"] == codec]
        numbers[codec] = {
            "max_rel_error": max(row["max_rel_error"] for row in rows),
            "least_cosine": min(row["least_cosine"] for row in rows),
        }
    return numbers


def exact_text(found: dict[str, Any], arguments: Namespace) -> str:
    rows = [
        [row["way"], row["codec"], f"{row['max_rel_error']:.1e}", f"{row['least_cosine']:.6f}"] for row in found["rows"]
    ]
    lines = [
        "## Hidden states beside those of one device",
        "",
        f"The same decoupled model, {arguments.tokens} random tokens, four devices, every original layer computed one "
        f"way; the largest difference by the largest value, and the least cosine of a token's states. Wanted: FP32 ≤ "
        f"{WANTED_EXACT:g}, int8 cosine ≥ {WANTED_COSINE:g}.",
        "",
        *table(["original layers", "wire", "error", "least cosine"], rows),
    ]
    return "\n".join(lines)


WRITERS: dict[str, Callable[[Any, Namespace], str]] = {
    "exact": exact_text,
    "latency": latency_text,
    "overlap": overlap_text,
    "generation": generation_text,
    "uneven": uneven_text,
    "drop": drop_text,
    "grid": grid_text,
}
SUMMARIES: dict[str, Callable[[Any], Any]] = {
    "exact": exact_numbers,
    "latency": latency_numbers,
    "overlap": overlap_numbers,
    "generation": generation_numbers,
    "uneven": uneven_numbers,
    "drop": drop_numbers,
    "grid": grid_numbers,
}
