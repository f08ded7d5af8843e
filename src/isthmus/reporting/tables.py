"""Owns which of several tables of the same a terminal is given."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_what_fits(console: Console, *tables: Table) -> None:
    """The first that ``console`` has room for, else the last, folded."""
    unlimited = console.options.update(max_width=1000)  # else the answer is never more than there is
    fitting = (table for table in tables if console.measure(table, options=unlimited).maximum <= console.width)
    console.print(next(fitting, tables[-1]))
