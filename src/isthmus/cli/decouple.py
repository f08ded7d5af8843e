"""``isthmus decouple``: the options, explained. What they do is in ``isthmus.decoupling.run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _option(panel: str, help_text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **settings)


Model = Annotated[
    str, typer.Argument(help="BERT, RoBERTa, GPT-2, Llama, Mistral or Qwen: a Hugging Face id or checkpoint directory.")
]
Output = Annotated[Path, _option("Output", "Where the decoupled model goes: a Hugging Face directory.", metavar="DIR")]
Text = Annotated[
    list[str] | None,
    _option(
        "Text",
        "Text to distil on, of the kind that the model is used on: .txt, .jsonl, .tsv, a directory, or hf:NAME. May be "
        "repeated. No labels are needed.",
        metavar="FILE|NAME",
    ),
]
SubBlocks = Annotated[
    int,
    _option("Form", "Sub-blocks of a decoupled layer: as many devices can share it without a word.", min=2),
]
Groups = Annotated[
    int | None,
    _option(
        "Form",
        "Groups of layers. Each ends with an original layer, where the slices meet: one exchange a group. Left out: "
        "one for every three layers.",
        min=1,
    ),
]
OriginalLayers = Annotated[
    str | None,
    _option("Form", "Instead of --groups: the layers that stay original, from 0, such as [b]2,5[/].", metavar="LAYERS"),
]
Widths = Annotated[
    str | None,
    _option(
        "Form",
        "Uneven slices for uneven devices: each sub-block's share of the hidden units, such as [b]2,1,1[/].",
        metavar="SHARES",
    ),
]
Heads = Annotated[
    Literal["all", "own"],
    _option(
        "Form",
        "[b]all[/], as published: every sub-block has all attention heads. [b]own[/]: each has its share of them; "
        "smaller, with the KV cache of the original, less faithful.",
    ),
]
Minutes = Annotated[float | None, _option("Training", "How long to distil. Left out, and --steps too: 30.", min=0.01)]
Steps = Annotated[int | None, _option("Training", "Steps instead of minutes.", min=1)]
LearningRate = Annotated[float, _option("Training", "Peak learning rate of AdamW; falls to 0 on half a cosine.")]
BatchTokens = Annotated[int, _option("Training", "Tokens of a batch, padding included.", min=1)]
SeqLen = Annotated[int, _option("Training", "Longest text, in tokens; longer ones are cut.", min=8)]
Init = Annotated[
    Literal["fitted", "plain"],
    _option(
        "Training",
        "[b]fitted[/]: slices of the weights, fitted by least squares to what the original computes. [b]plain[/]: as "
        "they are.",
    ),
]
Patience = Annotated[
    int | None, _option("Training", "Stop after so many evaluations in a row that were no better.", min=1)
]
Dtype = Annotated[Literal["bf16", "fp32"], _option("Training", "Precision of the computation. Weights are FP32.")]
Device = Annotated[str, _option("Training", "[b]cpu[/], [b]cuda[/], or [b]auto[/]: a GPU where there is one.")]
Seed = Annotated[
    int, _option("Training", "Fixes what is held out, the order and everything else that is drawn.", min=0)
]
Resume = Annotated[bool, _option("Output", "Go on from the last checkpoint in --output.", "--resume")]
Overwrite = Annotated[bool, _option("Output", "Delete the run that --output holds, and all else there.", "--overwrite")]
Plain = Annotated[
    bool | None,
    _option("Output", "Plain progress lines or a live display. Left out: live in a terminal.", "--plain/--live"),
]


def decouple(
    model: Model,
    output: Output,
    text: Text = None,
    sub_blocks: SubBlocks = 2,
    groups: Groups = None,
    original_layers: OriginalLayers = None,
    widths: Widths = None,
    heads: Heads = "all",
    minutes: Minutes = None,
    steps: Steps = None,
    learning_rate: LearningRate = 1e-3,
    batch_tokens: BatchTokens = 1024,
    seq_len: SeqLen = 128,
    init: Init = "fitted",
    patience: Patience = None,
    dtype: Dtype = "bf16",
    device: Device = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plain: Plain = None,
) -> None:
    """Turn a checkpoint into one whose layers are sub-blocks that hardly ever communicate, and say what it cost.

    Slices of the weights are fitted, then distilled on text until the copy answers like the original:

        isthmus decouple ./minilm --output ./minilm-4 --sub-blocks 4 --groups 2 --text corpus.txt --minutes 30

    The result loads with AutoModel.from_pretrained after `import isthmus`.
    """
    from isthmus.decoupling.run import decouple as run
    from isthmus.spec.units import parse_numbers

    run(
        model,
        output=output,
        text=text or [],
        sub_blocks=sub_blocks,
        groups=groups,
        original_layers=None if original_layers is None else parse_numbers("original_layers", original_layers, int),
        widths=None if widths is None else parse_numbers("widths", widths, float),
        heads=heads,
        minutes=minutes,
        steps=steps,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        seq_len=seq_len,
        initialisation=init,
        patience=patience,
        dtype=dtype,
        device=device,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        plain=plain,
    )
