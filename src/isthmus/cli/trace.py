"""``isthmus trace``: record real expert popularity, to replay it in plans and simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.tune import Columns, Data, Dtype, MicroBatches, MicroBatchSize, Model, NumLayers, Plain, SeqLen


def trace(
    model: Model,
    *,
    data: Data,
    output: Annotated[Path, typer.Option(help="Where the counts go.", metavar="FILE.npz")] = Path("popularity.npz"),
    columns: Columns = None,
    seq_len: SeqLen = 512,
    micro_batch_size: MicroBatchSize = 1,
    micro_batches: MicroBatches = 4,
    steps: Annotated[int, typer.Option(help="Steps to record, no sequence twice.", min=1)] = 16,
    dtype: Dtype = "bf16",
    num_layers: NumLayers = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    plain: Plain = None,
) -> None:
    """Record which experts a model's routers choose on your data: tokens of every expert, layer by layer, step by step.

    Forward only, on the CPU; memory for the weights (2 bytes a parameter in bf16) is all it needs. Steps are those that
    `isthmus tune` would take with the same data options. The more skewed the popularity (G), the more experts are
    better computed on the CPU; the file says how skewed it really is:

        isthmus trace ./my-model --data train.jsonl --output popularity.npz
        isthmus plan tune ./my-model --cluster cluster.json --popularity popularity.npz
        isthmus simulate tune --model ./my-model --cluster a800-c1g2 --popularity popularity.npz
    """
    options = dict(locals())
    from isthmus.tuning.popularity import trace as run

    run(**options)
