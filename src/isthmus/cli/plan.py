"""``isthmus plan``: what would run where, how long it should take, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cli.sharing import Refresh, Timeout
from isthmus.cli.tune import Dtype, MicroBatches, MicroBatchesInFlight, MicroBatchSize, NumLayers, SeqLen

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


TuneModel = Annotated[
    str, typer.Argument(help="Hugging Face id or directory of a Mixture-of-Experts model; only config.json is read.")
]
TuneCluster = Annotated[
    str | None,
    typer.Option(
        help="Hosts and accelerators: a JSON file, see README, or [b]a800-c1g1, a800-c1g2, a800-c1g4[/]. Left out: "
        "this machine, measured if it was not yet.",
        metavar="FILE|NAME",
    ),
]
Method = Annotated[Literal["full"], typer.Option(help="What is trained: all parameters.")]
NumStages = Annotated[
    int | None, typer.Option(min=1, help="Stages that go round the accelerators. Left out: chosen.", metavar="N")
]
NumDevices = Annotated[
    int | None,
    typer.Option(
        min=1, help="Accelerators of a cluster that is known by name, or processes on this machine.", metavar="N"
    ),
]
TunePolicy = Annotated[
    Literal["affinity", "paper", "mobius", "gpipe-offload"],
    typer.Option(help="Who computes which expert, as in `isthmus tune`.", metavar="POLICY"),
]
Popularity = Annotated[
    str,
    typer.Option(
        help="How unevenly tokens choose experts: [b]uniform[/], [b]gini=0.4[/], or what `isthmus trace` recorded.",
        metavar="FILE|gini=G",
    ),
]
Accelerator = Annotated[
    Literal["auto", "cuda", "emulated", "host"],
    typer.Option(help="Of this machine, as in `isthmus tune`.", metavar="KIND"),
]
Emulate = Annotated[str | None, typer.Option(help="Of this machine, as in `isthmus tune`.", metavar="RATES")]
AcceleratorMemory = Annotated[
    str | None, typer.Option(help="Of each accelerator only so much, such as [b]16GiB[/].", metavar="SIZE")
]
PlannedTimeline = Annotated[
    str | None,
    typer.Option(
        help="Of this machine: write the predicted steps as a Chrome trace, and as a picture.", metavar="FILE"
    ),
]
Changes = Annotated[bool, typer.Option(help="Look for what would help most; takes most of the time.")]


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


@app.command()
def tune(
    model: TuneModel,
    *,
    cluster: TuneCluster = None,
    seq_len: SeqLen = 512,
    micro_batch_size: MicroBatchSize = 1,
    micro_batches: MicroBatches = 4,
    micro_batches_in_flight: MicroBatchesInFlight = None,
    dtype: Dtype = "bf16",
    method: Method = "full",
    num_layers: NumLayers = None,
    num_stages: NumStages = None,
    num_devices: NumDevices = None,
    policy: TunePolicy = "affinity",
    popularity: Popularity = "uniform",
    accelerator: Accelerator = "auto",
    emulate: Emulate = None,
    accelerator_memory: AcceleratorMemory = None,
    changes: Changes = True,
    timeline: PlannedTimeline = None,
    report: Report = None,
) -> None:
    """Say before anything is downloaded, bought or reserved whether fine-tuning fits, and how fast it should be.

    Memory is that of `isthmus tune`, counted from the model's configuration: weights, master weights, gradients and
    moments on every host; dense parts, activations and slots for experts on every accelerator. A step is simulated
    event by event (`isthmus simulate tune` compares policies), and so is every change that might help.

        isthmus plan tune ./my-model --cluster cluster.json --seq-len 512 --micro-batches 8
        isthmus plan tune allenai/OLMoE-1B-7B-0924 --cluster a800-c1g2 --dtype fp32 --popularity popularity.npz
    """
    asked = {name: value for name, value in locals().items() if name != "report"}
    from isthmus.tuning.preflight.run import PlanTuneOptions, plan_tune

    plan_tune(PlanTuneOptions(**asked), report=report)
