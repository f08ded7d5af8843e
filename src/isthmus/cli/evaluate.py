"""``isthmus evaluate``: models side by side on tasks and text. What it does is in ``isthmus.evaluation.run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Models = Annotated[
    list[str],
    typer.Argument(help="Hugging Face ids or directories, decoupled or not. The first is what others are compared to."),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        help="Labelled text to test on: a file of SST-2, CoLA, MRPC, MNLI or SQuAD v1.1 as published, any .tsv, "
        ".csv or .jsonl with sentence (or text) and label, a directory with train and dev files, or hf:NAME. May "
        "be repeated.",
        metavar="FILE|DIR|NAME",
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        help="What to train on. Left out: the train file beside the task's, or four fifths of it.",
        metavar="FILE|NAME",
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(help="Text for fidelity (line by line) and perplexity. May be repeated.", metavar="FILE|NAME"),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Some of finetune,probe,fidelity,perplexity. Left out: all that what is given is enough for.",
        metavar="NAMES",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Fine-tuning runs of each model; their mean and spread are told.")]
Epochs = Annotated[int, typer.Option(min=1, help="Times that fine-tuning sees the training examples.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of fine-tuning.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples of a step of fine-tuning.")]
SeqLen = Annotated[int, typer.Option(min=8, help="Longest input in tokens.")]
MaxTrain = Annotated[int | None, typer.Option(min=1, help="Train on a sample of so many examples.")]
Dtype = Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the computation. Weights are FP32.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]
Save = Annotated[
    Path | None,
    typer.Option(help="Keep every fine-tuned model, below DIR/MODEL/TASK-seed-N.", metavar="DIR"),
]
Report = Annotated[Path | None, typer.Option(help="Write the report here as JSON.", metavar="FILE")]


def evaluate(
    models: Models,
    task: Task = None,
    train: Train = None,
    text: Text = None,
    methods: Methods = None,
    seeds: Seeds = 3,
    epochs: Epochs = 1,
    learning_rate: LearningRate = 5e-5,
    batch_size: BatchSize = 32,
    seq_len: SeqLen = 128,
    max_train: MaxTrain = None,
    dtype: Dtype = "bf16",
    device: Device = "auto",
    save: Save = None,
    report: Report = None,
) -> None:
    """Score models on tasks, all by the same recipe: the original beside the decoupled one.

    isthmus evaluate ./minilm ./minilm-4 --task sst2_dev.tsv --train sst2_train.tsv --seeds 3
    """
    from rich.console import Console

    from isthmus.evaluation.finetuning import Recipe
    from isthmus.evaluation.run import evaluate as run
    from isthmus.reporting.evaluation_table import evaluation_table

    recipe = Recipe(num_epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, max_length=seq_len)
    result = run(
        models,
        tasks=task or [],
        train=train,
        text=text or [],
        methods=None if methods is None else [name.strip() for name in methods.split(",") if name.strip()],
        num_seeds=seeds,
        recipe=recipe,
        max_train=max_train,
        dtype=dtype,
        device=device,
        save=save,
        report=report,
    )
    console = Console()
    console.print(evaluation_table(result))
    for note in result.config["notes"]:  # type: ignore[attr-defined]
        console.print(note, soft_wrap=True)
