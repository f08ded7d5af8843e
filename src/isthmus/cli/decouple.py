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
Output = Annotated[
    Path | None, _option("Output", "Where the decoupled model goes: a Hugging Face directory.", metavar="DIR")
]
Text = Annotated[
    list[str] | None,
    _option(
        "Text",
        "Text to distil on, of the kind that the model is used on: .txt, .jsonl, .tsv, a directory, or hf:NAME. May be "
        "repeated. No labels are needed.",
        metavar="FILE|NAME",
    ),
]
EvalText = Annotated[
    list[str] | None,
    _option(
        "Text",
        "Text to compare copy and original on. Left out: 2 % of the text, which is then not trained on. May be "
        "repeated.",
        metavar="FILE|NAME",
    ),
]
Task = Annotated[
    str | None,
    _option(
        "Text",
        "Labelled text to distil for, such as SST-2's: the original is fine-tuned on it first, and the copy learns to "
        "classify as it does. A file, a directory with train and dev, or hf:NAME, as in isthmus evaluate.",
        metavar="FILE|DIR|NAME",
    ),
]
Epochs = Annotated[int, _option("Text", "With --task: how often the original sees each example.", min=1)]
SubBlocks = Annotated[
    str,
    _option(
        "Form",
        "Sub-blocks of a decoupled layer: as many devices can share it without a word. [b]auto[/], with --plan: 2, 4 "
        "and 8.",
        metavar="N|auto",
    ),
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
    _option(
        "Form",
        "The layers that stay original, from 0, such as [b]2,5[/], instead of --groups; or [b]sensitive[/]: as many as "
        "--groups, those that are measured to be worst to decouple.",
        metavar="LAYERS|sensitive",
    ),
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
Basis = Annotated[
    Literal["auto", "shared", "kept"],
    _option(
        "Training",
        "[b]shared[/]: change the basis of the hidden units such that every slice sees some of all that is strong, "
        "which Llama, Mistral and Qwen allow. [b]kept[/]: as it is. [b]auto[/]: shared, unless head and embeddings are "
        "one table, which it would make two.",
    ),
]
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
PlanOnly = Annotated[
    bool,
    _option(
        "Output",
        "Train nothing: show what each form would gain on devices and, with --text, how close it is before training.",
        "--plan",
    ),
]
Plain = Annotated[
    bool | None,
    _option("Output", "Plain progress lines or a live display. Left out: live in a terminal.", "--plain/--live"),
]


def decouple(
    model: Model,
    output: Output = None,
    text: Text = None,
    eval_text: EvalText = None,
    task: Task = None,
    epochs: Epochs = 1,
    plan: PlanOnly = False,
    sub_blocks: SubBlocks = "2",
    groups: Groups = None,
    original_layers: OriginalLayers = None,
    widths: Widths = None,
    heads: Heads = "all",
    minutes: Minutes = None,
    steps: Steps = None,
    learning_rate: LearningRate = 5e-4,
    batch_tokens: BatchTokens = 1024,
    seq_len: SeqLen = 128,
    basis: Basis = "auto",
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

    The result loads with AutoModel.from_pretrained after `import isthmus`. What each form would gain, before training:

        isthmus decouple ./minilm --plan --sub-blocks auto
    """
    asked = dict(locals())
    from isthmus.decoupling.run import decouple as run
    from isthmus.spec.errors import IsthmusError
    from isthmus.spec.units import parse_numbers

    for name, kind in (("original_layers", int), ("widths", float)):
        if asked[name] is not None and (name, asked[name]) != ("original_layers", "sensitive"):
            asked[name] = parse_numbers(name, asked[name], kind)
    asked |= {"sub_blocks": _number_or_auto(sub_blocks), "text": text or [], "eval_text": eval_text or []}
    if asked.pop("plan"):
        _print_plan(asked)
        return
    if output is None or asked["sub_blocks"] is None:
        what = "output: give --output DIR" if output is None else "sub_blocks: auto is for --plan; give a number"
        raise IsthmusError(what)
    run(**asked)


def _number_or_auto(text: str) -> int | None:
    from isthmus.spec.errors import IsthmusError

    if text == "auto":
        return None
    if not text.isdigit():
        raise IsthmusError(f"sub_blocks: got {text!r}, wanted a number of 2 or more, or auto with --plan")
    return int(text)


def _print_plan(asked: dict[str, Any]) -> None:
    from rich.console import Console

    from isthmus.decoupling.plan import plan_decouple
    from isthmus.spec.errors import IsthmusError

    if asked["original_layers"] == "sensitive":
        raise IsthmusError("original_layers: sensitive is measured when a model is decoupled, not with --plan")
    names = ("model", "sub_blocks", "groups", "original_layers", "text", "plain")
    Console().print(plan_decouple(**{name: asked[name] for name in names}))
