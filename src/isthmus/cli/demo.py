"""``isthmus demo``: a working example from nothing, pictures included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes; an earlier demo there is replaced.")] = Path(
        "demo-out"
    ),
    text: Annotated[
        Path | None, typer.Option(help="Train on this file or directory instead of the standard library's source.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Fine-tuning steps.", min=3)] = 60,
) -> None:
    """Fine-tune a small Mixture-of-Experts model on real text, draw what happened, and compare the policies. A few
    minutes on two cores."""
    from isthmus.tuning.demo import run_demo

    run_demo(output, text=text, steps=steps)
