"""``isthmus bench``: paired runs that compare what the project can do with what others do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cli.sharing import Timeout

app = typer.Typer(no_args_is_help=True)

Decoupled = Annotated[
    str | None,
    typer.Option(help="What `isthmus decouple` made of MODEL, timed beside it in the same run.", metavar="DIR"),
]
Strategies = Annotated[
    str,
    typer.Option(
        help="Of [b]single,tensor,sequence,pipeline[/] and, for decoupled models, [b]block[/], separated by commas, or "
        "[b]all[/]."
    ),
]


@app.callback()
def bench() -> None:
    """Compare policies, or ways of answering a request, in paired runs."""


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


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="Hugging Face id or checkpoint directory.")],
    decoupled: Decoupled = None,
    strategies: Strategies = "all",
    codecs: Annotated[
        str, typer.Option(help="What goes on the wire: of [b]fp32,bf16,int8,int4[/], or [b]all[/].")
    ] = "fp32",
    dtypes: Annotated[str, typer.Option(help="What is computed in: of [b]fp32,bf16,int8[/], or [b]all[/].")] = "fp32",
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    new_tokens: Annotated[
        int,
        typer.Option(min=0, help="To be generated for each sequence (decoders); 0: its hidden states are asked for."),
    ] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Requests to each plan, in turns.")] = 10,
    transport: Annotated[Literal["sockets", "gloo"], typer.Option(help="What carries messages.")] = "sockets",
    max_error: Annotated[
        float, typer.Option(min=0, help="Relative error that the planner's own choice may have; see `plan infer`.")
    ] = 0.0,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the devices again though it was done.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the results here as JSON, a table and a picture beside it.", metavar="FILE"),
    ] = None,
    timeout: Timeout = 60.0,
) -> None:
    """Time ways of dividing one request among devices, beside what was predicted and the bound.

    With --decoupled the model and its decoupled copy answer the same request, each in every way that it has.

    Runs once per device:

        sudo isthmus testbed run -- isthmus bench infer ./bert --codecs fp32,int8 --report bench.json
        sudo isthmus testbed run -- isthmus bench infer ./llama --tokens 64 --new-tokens 32
        sudo isthmus testbed run -- isthmus bench infer ./llama --decoupled ./llama-4
    """
    from isthmus.inference.bench import BenchOptions, bench_infer
    from isthmus.spec.inference import CODECS, DTYPES, STRATEGIES
    from isthmus.spec.units import parse_names

    options = BenchOptions(
        model=model,
        decoupled=decoupled,
        strategies=parse_names("strategies", strategies, STRATEGIES),
        codecs=parse_names("codecs", codecs, CODECS),
        dtypes=parse_names("dtypes", dtypes, DTYPES),
        tokens=tokens,
        batch=batch,
        new_tokens=new_tokens,
        repeats=repeats,
        transport=transport,
        max_error=max_error,
        refresh=refresh,
        timeout_s=timeout,
    )
    bench_infer(options, report=report)
