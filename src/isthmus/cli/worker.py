"""``isthmus worker``: lend this device to requests that are made on another."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer


def worker(
    listen: Annotated[
        str, typer.Option(help="An address of this device's own. Only what reaches it can invite this device.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 29400,
    model: Annotated[
        Path | None, typer.Option(help="Where this device has the model, if not where the leader has it.")
    ] = None,
) -> None:
    """Wait to be invited by `isthmus embed` or `isthmus generate` on another device.

    Nothing is encrypted and nobody is asked for a password: listen only on a network that you trust.

        isthmus worker --listen 192.168.1.10
    """
    from isthmus.inference.worker import Worker

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with Worker(listen, port, model=model, tell=lambda line: typer.echo(line, err=True)) as device:
        try:
            device.serve()
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
