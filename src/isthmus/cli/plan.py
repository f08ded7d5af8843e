"""``isthmus plan``: what would run where, how long it should take, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.sharing import Refresh, Timeout

app = typer.Typer(no_args_is_help=True)
Profile = Annotated[
    Path | None,
    typer.Option(
        help="What was measured: a profile, or a report of this command or `isthmus bench infer`.", metavar="FILE"
    ),
]
Report = Annotated[
    Path | None, typer.Option(help="Write what was measured and predicted here as JSON.", metavar="FILE")
]


@app.callback()
def plan() -> None:
    """What would run where, how long it should take, and why."""


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="Hugging Face id or checkpoint directory.")],
    cluster: Annotated[
        Path | None,
        typer.Option(help="Devices: cluster.json, see README. Left out: those that were started.", metavar="FILE"),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Plan with only these of the cluster, by name, with commas.", metavar="NAME,…")
    ] = None,
    profile: Profile = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=0, help="To generate for each sequence.")] = 0,
    codec: Annotated[
        str, typer.Option(help="What goes on the wire: [b]fp32,bf16,int8,int4[/], or [b]auto[/] within --max-error.")
    ] = "fp32",
    dtype: Annotated[
        str, typer.Option(help="What is computed in: [b]fp32,bf16,int8[/], or [b]auto[/] within --max-error.")
    ] = "fp32",
    max_error: Annotated[
        float,
        typer.Option(
            min=0,
            help="Relative error of hidden states that auto may expect of all that is sent (bf16 0.0017, int8 0.006, "
            "int4 0.11 an exchange, as squares), and of weights (bf16 0.03, int8 0.1).",
        ),
    ] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Plans to print.")] = 20,
    refresh: Refresh = False,
    output: Annotated[Path | None, typer.Option(help="Write the plan here as JSON.", metavar="FILE")] = None,
    report: Report = None,
    timeout: Timeout = 60.0,
) -> None:
    """Predict every way of dividing one request among devices, choose, and say what decoupling the model would bring.

    Started once per device it measures them and their links first, and keeps that:

        sudo isthmus testbed run -- isthmus plan infer ./bert --cluster cluster.json
        isthmus plan infer ./bert --cluster cluster.json --tokens 512
    """
    from isthmus.inference.plan import PlanOptions, plan_infer

    options = PlanOptions(
        model=model,
        cluster=cluster,
        devices=None if devices is None else tuple(name.strip() for name in devices.split(",") if name.strip()),
        profile=profile,
        tokens=tokens,
        batch=batch,
        new_tokens=new_tokens,
        codec=codec,
        dtype=dtype,
        max_error=max_error,
        refresh=refresh,
        timeout_s=timeout,
    )
    plan_infer(options, num_rows=rows, output=output, report=report)
