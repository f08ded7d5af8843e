"""Options of every verb that answers a request on several devices, and the engine that they ask for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import typer

from isthmus.spec.inference import InferenceRequest

Devices = Annotated[
    str | None,
    typer.Option(
        help="Addresses of devices that run `isthmus worker`, with commas; this one leads and computes too.",
        metavar="HOST[:PORT],…",
    ),
]
Codec = Annotated[Literal["fp32", "bf16", "int8", "int4"], typer.Option(help="What devices send one another.")]
Dtype = Annotated[
    Literal["fp32", "bf16", "int8"],
    typer.Option(help="What matrices are kept and multiplied in; int8 takes the least memory, and is not exact."),
]
Weights = Annotated[
    str | None, typer.Option(help="Each device's part of the work, such as 0.2,0.45,0.6. Without: the planner's.")
]
Refresh = Annotated[bool, typer.Option("--refresh", help="Measure devices and links again though it was done.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a device before giving up.")]
STRATEGY_HELP = "How several devices divide the work. auto: as is predicted fastest, with all of them or fewer."


def open_shared(
    model: str,
    request: InferenceRequest,
    *,
    devices: str | None,
    weights: str | None,
    timeout: float,
    **options: Any,
) -> AbstractContextManager[Any]:
    """``inference.run.open_engine`` by what was typed; it tells on stderr what happens."""
    from isthmus.inference.joining import parse_devices
    from isthmus.inference.run import open_engine, parse_weights

    return open_engine(
        model,
        workers=None if devices is None else parse_devices(devices),
        weights=parse_weights(weights),
        request=request,
        timeout_s=timeout,
        tell=lambda line: typer.echo(line, err=True),
        **options,
    )
