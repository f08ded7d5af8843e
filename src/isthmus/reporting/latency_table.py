"""Owns how the rows of ``isthmus bench infer`` are written: as a table in the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from isthmus.reporting.human import human_bytes, human_s
from isthmus.reporting.latency_plot import Cells
from isthmus.spec.report import BenchInferRow

COLUMNS = (
    "strategy",
    "devices",
    "wire",
    "dtype",
    "bound",
    "measured (p10–p90)",
    "of bound",
    "predicted",
    "off by",
    "sent",
    "exchanges",
    "error",
)
NARROW = ("strategy", "wire", "measured", "predicted", "of bound", "sent", "error")
"""Fits 80 characters."""
_TEXTS = ("strategy", "wire", "dtype")
_CHOICE = "→"


def latency_table(cells: Cells, columns: Sequence[str] = COLUMNS) -> Table:
    """The bound first, then what was measured and its share of the bound, then what was predicted; the planner's choice
    has an arrow. With a section per bandwidth, widest first, where ``cells`` says what it was; fastest first."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    has_bandwidth = None not in cells
    if has_bandwidth:
        table.add_column("Mbit/s", justify="right")
    for name in ("", *columns):
        # A head of two lines keeps a few columns within 80 characters.
        table.add_column(name.replace("of ", "of\n"), justify="left" if name in ("", *_TEXTS) else "right")
    for bandwidth in sorted(cells, key=lambda bandwidth: -(bandwidth or 0)):
        table.add_section()
        for place, row in enumerate(_in_order(cells[bandwidth])):
            where = [f"{(bandwidth or 0) / 1e6:g}" if place == 0 else ""] if has_bandwidth else []
            found = _row_cells(row)
            table.add_row(*where, _CHOICE if row.is_choice else "", *(found[name] for name in columns))
    return table


def latency_markdown(rows: Sequence[BenchInferRow]) -> str:
    """The same as GitHub markdown, fastest first; the planner's choice is bold."""
    lines = [f"| {' | '.join(COLUMNS)} |"]
    lines.append(f"|{'|'.join('---' if name in _TEXTS else '---:' for name in COLUMNS)}|")
    for row in _in_order(rows):
        found = _row_cells(row)
        texts = [f"**{found[name]}**" if row.is_choice and found[name] else found[name] for name in COLUMNS]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _in_order(rows: Sequence[BenchInferRow]) -> list[BenchInferRow]:
    return sorted(rows, key=lambda row: row.latency_s.median)


def _row_cells(row: BenchInferRow) -> dict[str, str]:
    spread = row.latency_s
    return {
        "strategy": f"{row.strategy} {row.algorithm}".strip(),
        "devices": str(row.num_devices),
        "wire": row.codec if row.num_devices > 1 else "",
        "dtype": row.dtype,
        "bound": human_s(row.bound_s),
        "measured (p10–p90)": f"{human_s(spread.median)} ({human_s(spread.p10)}–{human_s(spread.p90)})",
        "measured": human_s(spread.median),
        "of bound": f"{row.bound_s / spread.median:.2f}",
        "predicted": human_s(row.predicted_latency_s),
        "off by": f"{row.predicted_latency_s / spread.median - 1:+.0%}",
        "sent": human_bytes(row.bytes_sent_per_device),
        "exchanges": str(row.num_exchanges),
        "error": "" if row.max_rel_error is None else f"{row.max_rel_error:.1e}",
    }
