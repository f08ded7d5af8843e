"""``isthmus embed``: vectors of texts from an encoder, on one device or several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def embed(
    model: Annotated[str, typer.Argument(help="Hugging Face id or checkpoint directory.")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="A text in each line; - is standard input.")] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Addresses of devices that run `isthmus worker`, with commas; this one leads and computes too.",
            metavar="HOST[:PORT],…",
        ),
    ] = None,
    strategy: Annotated[
        Literal["auto", "tensor", "sequence"] | None, typer.Option(help="How several devices divide the work.")
    ] = "auto",
    codec: Annotated[
        Literal["fp32", "bf16", "int8", "int4"], typer.Option(help="What devices send one another.")
    ] = "fp32",
    dtype: Annotated[Literal["fp32", "bf16", "int8"], typer.Option(help="What matrices are multiplied in.")] = "fp32",
    weights: Annotated[
        str | None, typer.Option(help="Each device's part of the work, such as 0.2,0.45,0.6; even without.")
    ] = None,
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
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a device before giving up.")] = 60.0,
) -> None:
    """Vectors of texts, as JSON lines: {"text": …, "embedding": […]}.

    On several devices either start one process on each with torchrun, or `isthmus worker` on the others and name them:

        isthmus embed ./minilm --text "narrow links" --devices 192.168.1.10,192.168.1.11
    """
    from isthmus.inference.joining import parse_devices
    from isthmus.inference.run import open_engine, parse_weights

    texts = _read_texts(text, text_file)
    with open_engine(
        model,
        workers=parse_devices(devices) if devices is not None else None,
        strategy=None if strategy == "auto" else strategy,
        codec=codec,
        dtype=dtype,
        weights=parse_weights(weights),
        timeout_s=timeout,
    ) as engine:
        if not engine.is_leader:
            engine.follow()
            return
        kind = None if pooling == "auto" else pooling
        vectors = engine.embed(texts, pooling=kind, normalize=normalize, batch_size=batch_size)
    _write(texts, [vector.tolist() for vector in vectors], output)


def _read_texts(text: list[str] | None, text_file: Path | None) -> list[str]:
    from isthmus.spec.errors import IsthmusError

    texts = list(text or ())
    if text_file is not None:
        texts += (sys.stdin.read() if str(text_file) == "-" else text_file.read_text()).splitlines()
    if not texts:
        raise IsthmusError("text: got none, wanted --text or --text-file with at least one line")
    return texts


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
