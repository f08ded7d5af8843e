"""The table of an evaluation: a line for each task and metric, a column for each model, the first one first."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from isthmus.spec.report import EvaluateReport, EvaluateRow


def evaluation_table(report: EvaluateReport) -> Table:
    """Mean ± standard deviation, and in brackets the difference from the first model."""
    models = [str(model) for model in report.config["models"]]  # type: ignore[attr-defined]
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for model in models:
        row = next((row for row in report.rows if row.model == model), None)
        form = "" if row is None or row.num_sub_blocks == 1 else f"\n{row.num_sub_blocks} sub-blocks"
        table.add_column(Text(model + form, overflow="fold"), justify="right")
    found = {(row.task, row.metric, row.model): row for row in report.rows}
    for task, metric in dict.fromkeys((row.task, row.metric) for row in report.rows):
        first = found.get((task, metric, models[0]))
        cells = [_cell(found.get((task, metric, model)), first) for model in models]
        table.add_row(task, metric, *cells)
    return table


def _cell(row: EvaluateRow | None, first: EvaluateRow | None) -> str:
    if row is None:
        return "–"
    spread = f" ± {row.std:.4f}" if row.num_seeds > 1 else ""
    difference = "" if first is None or first is row else f" ({row.mean - first.mean:+.4f})"
    return f"{row.mean:.4f}{spread}{difference}"
