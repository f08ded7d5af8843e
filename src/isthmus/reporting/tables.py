"""Owns tables for narrow terminals: how they are laid out, and which of several of the same is shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def compact_table(columns: Iterable[str], *, texts: Collection[str], folding: Collection[str]) -> Table:
    """Without rows yet. Heads take a line for each word; of cells only those of ``folding`` columns take several lines.
    ``texts`` are columns that begin at the left."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in columns:
        side = "left" if name in texts else "right"
        table.add_column(stacked(name), justify=side, overflow="fold", no_wrap=name not in folding)
    return table


def stacked(head: str) -> str:
    """A line for each word."""
    return head.replace(" ", "\n").replace("-", "-\n")


def print_what_fits(console: Console, *tables: Table) -> None:
    """The first that ``console`` has room for, else the last, folded."""
    unlimited = console.options.update(max_width=1000)  # else the answer is never more than there is
    fitting = (table for table in tables if console.measure(table, options=unlimited).maximum <= console.width)
    console.print(next(fitting, tables[-1]))
