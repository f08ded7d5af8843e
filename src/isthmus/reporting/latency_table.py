"""Owns how the rows of ``isthmus bench infer`` are written: as a table in the terminal and as markdown.

Rows of ``isthmus simulate infer`` are the same with one latency instead of a measured and a predicted one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from isthmus.reporting.human import human_bytes, human_s
from isthmus.reporting.latency_plot import Cells, are_simulated
from isthmus.reporting.tables import compact_table, print_what_fits
from isthmus.spec.report import BenchInferRow, Spread

_HOW = ("strategy", "devices", "wire", "dtype")
_FOUND = ("bound", "measured (p10–p90)", "of bound", "predicted", "off by")
_COST = ("sent", "exchanges", "error")
_SIMULATED = ("strategy", "devices", "wire", "dtype", "bound", "simulated", "of bound")
_SIMULATED_GENERATED = ("first token simulated", "token simulated")
_SIMULATED_NARROW = ("strategy", "devices", "wire", "simulated", "of bound", "sent")
_SIMULATED_GENERATED_NARROW = ("strategy", "wire", *_SIMULATED_GENERATED, "of bound")
_GENERATED = ("first token", "token (p10–p90)", "token predicted")
_NARROW = ("strategy", "wire", "measured", "predicted", "of bound", "sent", "error")
_NARROW_GENERATED = ("strategy", "wire", "first token", "token", "token predicted", "of bound", "sent")
_TEXTS = ("strategy", "wire", "dtype")
_FORM = "sub-blocks"
_CHOICE = "→"


def print_latency(cells: Cells, console: Console) -> None:
    """All columns where they fit ``console``, else the most important ones."""
    print_what_fits(console, latency_table(cells), latency_table(cells, is_narrow=True))


def latency_table(cells: Cells, *, is_narrow: bool = False) -> Table:
    """The bound first, then what was measured and its share of the bound, then what was predicted; the planner's choice
    has an arrow. With a section per bandwidth, widest first, where ``cells`` says what it was; fastest first.

    ``is_narrow``: fewer columns, which fit 80 characters.
    """
    has_bandwidth = None not in cells
    columns = _columns([row for rows in cells.values() for row in rows], is_narrow=is_narrow)
    heads = ("Mbit/s", "", *columns) if has_bandwidth else ("", *columns)
    table = compact_table(heads, texts=("", *_TEXTS), folding=("strategy",))
    for bandwidth in sorted(cells, key=lambda bandwidth: -(bandwidth or 0)):
        table.add_section()
        for place, row in enumerate(_in_order(cells[bandwidth])):
            where = [f"{(bandwidth or 0) / 1e6:g}" if place == 0 else ""] if has_bandwidth else []
            found = _row_cells(row)
            table.add_row(*where, _CHOICE if row.is_choice else "", *(found[name] for name in columns))
    return table


def latency_markdown(rows: Sequence[BenchInferRow]) -> str:
    """The same as GitHub markdown, fastest first; the planner's choice is bold."""
    columns = _columns(rows)
    lines = [f"| {' | '.join(columns)} |"]
    lines.append(f"|{'|'.join('---' if name in _TEXTS else '---:' for name in columns)}|")
    for row in _in_order(rows):
        found = _row_cells(row)
        texts = [f"**{found[name]}**" if row.is_choice and found[name] else found[name] for name in columns]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _columns(rows: Sequence[BenchInferRow], *, is_narrow: bool = False) -> tuple[str, ...]:
    """Where a decoupled model answered they say so, which takes the last one's place if ``is_narrow``."""
    has_forms = any(row.num_sub_blocks > 1 for row in rows)
    is_generated = any(row.num_new_tokens for row in rows)
    if are_simulated(rows) and is_narrow:
        columns = _SIMULATED_GENERATED_NARROW if is_generated else _SIMULATED_NARROW
        return (columns[0], _FORM, *columns[1:]) if has_forms else columns
    if are_simulated(rows):
        columns = (*_SIMULATED, *(_SIMULATED_GENERATED if is_generated else ()), "sent", "exchanges")
    elif is_narrow:
        columns = _NARROW_GENERATED if is_generated else _NARROW
    else:
        columns = (*_HOW, *_FOUND, *(_GENERATED if is_generated else ()), *_COST)
    if not has_forms:
        return columns
    return (columns[0], _FORM, *(columns[1:-1] if is_narrow else columns[1:]))


def _in_order(rows: Sequence[BenchInferRow]) -> list[BenchInferRow]:
    return sorted(rows, key=lambda row: row.latency_s.median)


def _row_cells(row: BenchInferRow) -> dict[str, str]:
    latency_s, token_s = row.latency_s, row.time_per_token_s
    first = "" if row.time_to_first_token_s is None else human_s(row.time_to_first_token_s.median)
    token = "" if token_s is None else human_s(token_s.median)
    return {
        "strategy": f"{row.strategy} {row.algorithm}".strip(),
        _FORM: str(row.num_sub_blocks) if row.num_sub_blocks > 1 else "",
        "devices": str(row.num_devices),
        "wire": row.codec if row.num_devices > 1 else "",
        "dtype": row.dtype,
        "bound": human_s(row.bound_s),
        "measured (p10–p90)": _with_range(latency_s),
        "measured": human_s(latency_s.median),
        "simulated": human_s(latency_s.median),
        "of bound": f"{row.bound_s / latency_s.median:.2f}",
        "predicted": human_s(row.predicted_latency_s),
        "off by": f"{row.predicted_latency_s / latency_s.median - 1:+.0%}",
        "first token": first,
        "first token simulated": first,
        "token (p10–p90)": "" if token_s is None else _with_range(token_s),
        "token": token,
        "token simulated": token,
        "token predicted": ("" if row.predicted_time_per_token_s is None else human_s(row.predicted_time_per_token_s)),
        "sent": human_bytes(row.bytes_sent_per_device),
        "exchanges": str(row.num_exchanges),
        "error": "" if row.max_rel_error is None else f"{row.max_rel_error:.1e}",
    }


def _with_range(spread: Spread) -> str:
    return f"{human_s(spread.median)} ({human_s(spread.p10)}–{human_s(spread.p90)})"
