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


TuneModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="A published shape ([b]S-8, S-16, S-64, M-8, M-16, L-8[/]), or a directory of which only config.json is "
        "read.",
    ),
]
TuneCluster = Annotated[
    str,
    typer.Option(
        "--cluster",
        help="[b]a800-c1g1, a800-c1g2, a800-c1g4[/] (accelerators at one processor of 28 cores), or a JSON file, see "
        "README.",
    ),
]
Popularity = Annotated[
    str,
    typer.Option(
        help="How unevenly tokens choose experts: [b]uniform[/], [b]gini=G[/] (G = mean over layers of the sum of "
        "squared shares), or a recorded trace (.npz).",
        metavar="gini=G|FILE",
    ),
]
Policies = Annotated[
    str,
    typer.Option(
        help="Of [b]gpipe, gpipe-offload, mobius, cpu-experts, aptmoe, affinity, zero3[/], with commas, or [b]all[/]. "
        "As in `isthmus tune`, [b]resident[/] is gpipe and [b]paper[/] aptmoe."
    ),
]

NumAccelerators = Annotated[int | None, typer.Option(min=1, help="Accelerators of a named cluster. Left out: 4.")]
NumStages = Annotated[
    int | None,
    typer.Option(min=1, help="Left out: two for each accelerator, more if memory needs it; affinity tries others too."),
]
MicroBatches = Annotated[int | None, typer.Option(min=1, help="Parts of a batch. Left out: one for each accelerator.")]
Steps = Annotated[
    int, typer.Option(min=1, help="The first has no history of popularity and counts only if it is alone.")
]
TimelineFile = Annotated[
    Path | None,
    typer.Option(
        help="Write the last step of every policy and device: NAME-policy-device.json for Perfetto, and a picture.",
        metavar="FILE",
    ),
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


@app.command()
def tune(
    model: TuneModel,
    cluster: TuneCluster,
    popularity: Popularity = "uniform",
    policies: Policies = "all",
    num_devices: NumAccelerators = None,
    num_stages: NumStages = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 128,
    micro_batches: MicroBatches = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 128,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of weights and computation.")] = "fp32",
    steps: Steps = 2,
    drift: Annotated[float, typer.Option(help="Share of experts that exchange their popularity each step.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawn popularity.")] = 0,
    predictor_accuracy: Annotated[float, typer.Option(help="Share of tokens predicted right a layer ahead.")] = 0.85,
    report: Report = None,
    timeline: TimelineFile = None,
) -> None:
    """Predict fine-tuning of a Mixture-of-Experts model on accelerators that are described, event by event.

    Every policy runs the same looped pipeline: stages go round the accelerators, each loads its next stage while one
    runs. [b]gpipe[/] keeps all on the accelerators, [b]gpipe-offload[/] loads a stage when it starts, [b]mobius[/] one
    ahead, [b]cpu-experts[/] computes every expert on the CPU, [b]aptmoe[/] follows the published rule (unpopular
    experts on the CPU), [b]affinity[/] is isthmus' own, [b]zero3[/] gathers every layer on every device (a cost
    model). What limits a step is the fullest column.

    isthmus simulate tune --model S-16 --cluster a800-c1g2 --popularity gini=0.4
    isthmus simulate tune --model ./mixtral --cluster cluster.json --popularity trace.npz --report out.json
    """
    from isthmus.cli.simulated_tune import SimulateTuneOptions, simulate_tune

    options = SimulateTuneOptions(
        model=model,
        cluster=cluster,
        popularity=popularity,
        policies=policies,
        num_devices=num_devices,
        num_stages=num_stages,
        batch=batch,
        micro_batches=micro_batches,
        seq_len=seq_len,
        dtype=dtype,
        steps=steps,
        drift=drift,
        seed=seed,
        predictor_accuracy=predictor_accuracy,
    )
    simulate_tune(options, report=report, timeline=timeline)
