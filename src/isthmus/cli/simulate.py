"""``isthmus simulate``: how long it would take on hardware that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True)

Model = Annotated[
    str | None,
    typer.Argument(
        help="Checkpoint directory, of which only config.json is read, or [b]bert-base[/], [b]bert-large[/], "
        "[b]gpt2[/], [b]gpt2-medium[/]."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="A known device, or several with commas; the first leads.", metavar="NAME,…")
]
NumDevices = Annotated[int | None, typer.Option(min=1, help="So many of the one that --device names.")]
Cluster = Annotated[
    Path | None, typer.Option(help="Devices that differ, or are not known: a file, see README.", metavar="FILE")
]
Bandwidths = Annotated[
    str | None,
    typer.Option(help="Mbit/s of every link, one after the other. Left out: the devices' own.", metavar="N,…"),
]
SubBlocks = Annotated[int | None, typer.Option(min=2, help="Compare with the model decoupled into so many.")]
Groups = Annotated[
    int | None, typer.Option(min=1, help="Of layers, each ending with an original one. Left out: three layers each.")
]
Report = Annotated[
    Path | None, typer.Option(help="Write the results here as JSON, a table and a picture beside.", metavar="FILE")
]


@app.callback()
def simulate() -> None:
    """How long it would take on hardware that is not here."""


@app.command()
def infer(
    model: Model = None,
    device: Device = None,
    num_devices: NumDevices = None,
    cluster: Cluster = None,
    bandwidths: Bandwidths = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each sequence.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=0, help="To generate for each sequence (decoders).")] = 0,
    codec: Annotated[str, typer.Option(help="On the wire: of [b]fp32,bf16,int8,int4[/], or [b]all[/].")] = "fp32",
    dtype: Annotated[str, typer.Option(help="What is computed in: of [b]fp32,int8[/].")] = "fp32",
    sub_blocks: SubBlocks = None,
    groups: Groups = None,
    heads: Annotated[Literal["all", "own"], typer.Option(help="Of a sub-block, see `isthmus decouple`.")] = "all",
    report: Report = None,
    list_devices: Annotated[bool, typer.Option("--list-devices", help="Show the known devices.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show DeTransformer's published table beside the simulated one.")
    ] = False,
) -> None:
    """Predict ways of answering one request on devices that are described, not measured, with the planner's own model.

    isthmus simulate infer bert-base --sub-blocks 4 --device raspberry-pi-4b --num-devices 4 --bandwidths 1000,125
    isthmus simulate infer ./decoupled --cluster hardware.json --codec fp32,int8 --report simulated.json
    """
    from isthmus.cli.simulated import SimulateOptions, print_devices, simulate_infer, simulate_published
    from isthmus.spec.units import parse_numbers

    if list_devices or published:
        print_devices() if list_devices else simulate_published(report=report)
        return
    options = SimulateOptions(
        model=model,
        device=device,
        num_devices=num_devices,
        cluster=cluster,
        bandwidths=() if bandwidths is None else tuple(parse_numbers("bandwidths", bandwidths, float)),
        tokens=tokens,
        batch=batch,
        new_tokens=new_tokens,
        codecs=codec,
        dtypes=dtype,
        sub_blocks=sub_blocks,
        groups=groups,
        heads=heads,
    )
    simulate_infer(options, report=report)
