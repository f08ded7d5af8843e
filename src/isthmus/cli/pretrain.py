"""``isthmus pretrain``: the options, explained. What they do is in ``isthmus.decoupling.pretraining``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.decouple import (
    Device,
    Dtype,
    Groups,
    Heads,
    LearningRate,
    Overwrite,
    Plain,
    Resume,
    Seed,
    Steps,
)

Config = Annotated[
    Path,
    typer.Option(
        help="config.json of the original twin: bert and roberta learn masked words, gpt2, llama, mistral and qwen the "
        "next word. Size is what it says.",
        metavar="FILE",
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        help="Text to learn: .txt, .jsonl, .tsv, a directory, or hf:NAME. May be repeated.", metavar="FILE|NAME"
    ),
]
Output = Annotated[Path, typer.Option(help="Where both twins go: DIR/original and DIR/decoupled.", metavar="DIR")]
OriginalLayers = Annotated[
    str | None,
    typer.Option(
        help="Instead of --groups: the layers that stay original, from 0, such as [b]2,5[/].", metavar="LAYERS"
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="Tokenizer to use. Left out: a byte-level BPE of the configuration's vocab_size, trained on --data.",
        metavar="DIR",
    ),
]
Minutes = Annotated[
    float | None, typer.Option(min=0.01, help="For both twins together. Left out, and --steps too: 60.")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a batch.")]
SeqLen = Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")]


def pretrain(
    config: Config,
    data: Data,
    output: Output,
    sub_blocks: Annotated[int, typer.Option(min=1, help="Sub-blocks of a decoupled layer. 1: the original alone.")] = 4,
    groups: Groups = None,
    original_layers: OriginalLayers = None,
    heads: Heads = "all",
    tokenizer: Tokenizer = None,
    minutes: Minutes = None,
    steps: Steps = None,
    learning_rate: LearningRate = 1e-3,
    batch_tokens: BatchTokens = 2048,
    seq_len: SeqLen = 128,
    dtype: Dtype = "bf16",
    device: Device = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plain: Plain = None,
) -> None:
    """Train an original and a decoupled model from scratch, alike in all but their form: the published way.

    isthmus pretrain --config base.json --sub-blocks 4 --groups 4 --data wiki.txt --output twins/ --minutes 60
    """
    from isthmus.decoupling.pretraining import pretrain as run
    from isthmus.spec.units import parse_numbers

    run(
        config,
        data=data,
        output=output,
        sub_blocks=sub_blocks,
        groups=groups,
        original_layers=None if original_layers is None else parse_numbers("original_layers", original_layers, int),
        heads=heads,
        tokenizer=tokenizer,
        minutes=minutes,
        steps=steps,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        seq_len=seq_len,
        dtype=dtype,
        device=device,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        plain=plain,
    )
