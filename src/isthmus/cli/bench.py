"""``isthmus bench``: paired runs that compare what the project can do with what others do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Compare policies in paired runs on this machine.")


@app.callback()
def bench() -> None:
    """Compare policies in paired runs on this machine."""


@app.command()
def tune(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint directory of a MoE model. Left out: a model of random weights is made.", metavar="DIR"
        ),
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Policies to compare, separated by commas, or [b]all[/]. See `isthmus tune --help`.")
    ] = "all",
    skew: Annotated[
        str,
        typer.Option(
            help="How unevenly tokens choose experts: [b]uniform[/] or G = mean over layers of Σ p², p the share of an "
            "expert. A bias on the router's logits is solved for it, so routing stays real."
        ),
    ] = "uniform,0.2,0.4",
    cpu_speed: Annotated[
        str, typer.Option(help="Fractions of this machine's speed at which CPU experts run: what fewer cores would do.")
    ] = "1,0.5,0.25",
    report: Annotated[Path | None, typer.Option(help="Write the results here as JSON.", metavar="FILE")] = None,
) -> None:
    """Time the policies of `isthmus tune` against each other, over skew and CPU speed, as shares of the bound."""
    from isthmus.tuning.bench import bench_tune

    bench_tune(model=model, policies=policies, skew=skew, cpu_speed=cpu_speed, report=report)
