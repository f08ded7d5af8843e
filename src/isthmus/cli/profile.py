"""``isthmus profile``: measure this machine with a model's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def profile(
    model: Annotated[str, typer.Argument(help="Hugging Face id or checkpoint directory of a MoE model.")],
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision to measure in.")] = "bf16",
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 512,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of one micro-batch.")] = 1,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of one step.")] = 4,
    accelerator: Annotated[
        Literal["auto", "cuda", "emulated", "host"], typer.Option(help="As in `isthmus tune`.")
    ] = "auto",
    emulate: Annotated[str | None, typer.Option(help="As in `isthmus tune`.", metavar="RATES")] = None,
    cpu_speed: Annotated[float, typer.Option(help="As in `isthmus tune`.")] = 1.0,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again though a cached profile is there.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the profile here as JSON too.", metavar="FILE")] = None,
) -> None:
    """Measure seconds of this model's experts on CPU and accelerator by token count, of copies and of the optimizer.

    `isthmus tune` does the same when it needs to; what was measured once is kept in a cache.
    """
    from isthmus.tuning.profile import profile as run

    run(
        model,
        dtype=dtype,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        accelerator=accelerator,
        emulate=emulate,
        cpu_speed=cpu_speed,
        refresh=refresh,
        output=output,
    )
