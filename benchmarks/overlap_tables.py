"""What ``decoupled_testbed.py`` found of exchanges that overlap with computing, as a table and as numbers."""

from __future__ import annotations

import itertools
from argparse import Namespace
from typing import Any

from table_parts import median, name_of, row_of, table, with_spread

LABELS = ("at once", "in portions", "planned")


def overlap_numbers(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bandwidth and codec: the part of its seconds that a request gains in portions, measured and predicted, and
    how much longer what was chosen takes than the faster of the two."""
    numbers = []
    for cell in cells:
        links = [link["overlapping"] for link in cell["profiles"]["decoupled"]["links"]]
        for codec in cell["job"]["codecs"]:
            plain, divided, choice = (row_of(cell, f"{label} decoupled fp32 {codec}") for label in LABELS)
            numbers.append(
                {
                    "mbit_per_s": cell["mbit_per_s"],
                    "codec": codec,
                    "gain": 1 - median(divided) / median(plain),
                    "predicted_gain": 1 - divided["predicted_latency_s"] / plain["predicted_latency_s"],
                    "is_chosen": bool(choice["plan"]["overlaps"]),
                    "choice_over_best": median(choice) / min(median(plain), median(divided)),
                    "starting_s": max(link["starting_s"] for link in links),
                    "sending_s_per_byte": max(link["s_per_byte"] for link in links),
                }
            )
    return numbers


def overlap_text(cells: list[dict[str, Any]], arguments: Namespace) -> str:
    numbers = {(each["mbit_per_s"], each["codec"]): each for each in overlap_numbers(cells)}
    names = ["Mbit/s", "wire", "", "plan", "bound s", "predicted s", "measured s (p10–p90)", "off by"]
    names += ["gain, predicted", "gain, measured", "starting µs", "sending ns a byte"]
    rows = []
    for cell in cells:
        for codec, label in itertools.product(cell["job"]["codecs"], LABELS):
            row, each = row_of(cell, f"{label} decoupled fp32 {codec}"), numbers[cell["mbit_per_s"], codec]
            is_divided = label == "in portions"
            rows.append(
                [
                    cell["mbit_per_s"],
                    codec,
                    label,
                    name_of(row["plan"]),
                    f"{row['bound_s']:.3f}",
                    f"{row['predicted_latency_s']:.3f}",
                    with_spread(row["latency_s"]),
                    f"{row['predicted_latency_s'] / median(row) - 1:+.0%}",
                    f"{each['predicted_gain']:.1%}" if is_divided else "",
                    f"{each['gain']:.1%}" if is_divided else "",
                    f"{each['starting_s'] * 1e6:.0f}",
                    f"{each['sending_s_per_byte'] * 1e9:.1f}",
                ]
            )
    lines = [
        "## Exchanges in portions, while others are computed",
        "",
        f"The fastest plan that exchanges all at once, the same in portions, and what the planner takes (which may be "
        f"the same as one of them: then it shows the noise). {arguments.tokens} tokens, four devices of "
        f"{arguments.cpu:g} core, in turns. *Starting*: by how much longer an exchange takes on a thread of its own; "
        "*sending*: by how much longer computing takes for every byte that goes out and comes in meanwhile; as "
        "measured, of the slowest device.",
        "",
        *table(names, rows),
    ]
    return "\n".join(lines)
