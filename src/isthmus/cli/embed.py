"""``isthmus embed``: vectors of texts from an encoder, on one device or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cli.sharing import STRATEGY_HELP, Codec, Devices, Dtype, Refresh, Timeout, Weights, open_shared


def embed(
    model: Annotated[str, typer.Argument(help="Hugging Face id or checkpoint directory.")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="A text in each line; - is standard input.")] = None,
    devices: Devices = None,
    strategy: Annotated[
        Literal["auto", "tensor", "sequence", "pipeline", "block"],
        typer.Option(help=STRATEGY_HELP),
    ] = "auto",
    codec: Codec = "fp32",
    dtype: Dtype = "fp32",
    weights: Weights = None,
    refresh: Refresh = False,
    pooling: Annotated[
        Literal["auto", "mean", "cls", "tokens"],
        typer.Option(help="One vector a text, or one for each token. auto: as the model's own files say, or the mean."),
    ] = "auto",
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide each vector by its length. Without: as with auto."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts computed at a time.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines here instead of to standard output.")] = None,
    timeout: Timeout = 60.0,
) -> None:
    """Vectors of texts, as JSON lines: {"text": …, "embedding": […]}.

    On several devices either start one process on each with torchrun, or `isthmus worker` on the others and name them:

        isthmus embed ./minilm --text "narrow links" --devices 192.168.1.10,192.168.1.11
    """
    from isthmus.inference.run import read_lines, request_of

    texts = read_lines("text", text, text_file)
    request = request_of(model, texts, batch_size=batch_size)
    shared = {"strategy": strategy, "codec": codec, "dtype": dtype, "refresh": refresh}
    with open_shared(model, request, devices=devices, weights=weights, timeout=timeout, **shared) as engine:
        if not engine.is_leader:
            engine.follow()
            return
        kind = None if pooling == "auto" else pooling
        vectors = engine.embed(texts, pooling=kind, normalize=normalize, batch_size=batch_size)
    _write(texts, [vector.tolist() for vector in vectors], output)


def _write(texts: list[str], vectors: list[list], output: Path | None) -> None:
    from isthmus.spec.files import atomic_write

    lines = [
        json.dumps({"text": text, "embedding": vector}, ensure_ascii=False)
        for text, vector in zip(texts, vectors, strict=True)
    ]
    if output is None:
        typer.echo("\n".join(lines))
    else:
        atomic_write(output, "\n".join(lines) + "\n")
