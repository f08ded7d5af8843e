"""``isthmus demo``: a working example of every part from nothing, pictures included."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes; an earlier demo there is replaced.")] = Path(
        "demo-out"
    ),
    only: Annotated[
        Literal["tune", "infer", "decouple"] | None,
        typer.Option(help="One of the parts. Left out: all, in this order."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Train on this file or directory instead of the standard library's source.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Fine-tuning steps.", min=3)] = 60,
    model: Annotated[
        str | None,
        typer.Option(help="For infer: this checkpoint instead of one with random weights.", metavar="DIR"),
    ] = None,
    decouple_minutes: Annotated[float, typer.Option(help="For decouple: how long to distil.", min=0.01)] = 2.0,
    processes: Annotated[
        bool, typer.Option("--processes", help="For infer: plain processes, also where a testbed could be raised.")
    ] = False,
) -> None:
    """Fine-tune a small Mixture-of-Experts model on real text, draw what happened and compare the policies; then answer
    one request on four weak devices in every way; then train and decouple a small model, in three minutes. Devices are
    emulated as root, else plain processes. Seven minutes on two cores."""
    if only in (None, "tune"):
        from isthmus.tuning.demo import run_demo

        run_demo(output, text=text, steps=steps)
    if only in (None, "infer"):
        _infer(output / "infer", model, wants_testbed=not processes)
    if only in (None, "decouple"):
        from rich.console import Console

        from isthmus.decoupling.demo import run_decouple_demo

        Console(stderr=True).rule("a small model decoupled into four sub-blocks that hardly ever communicate")
        run_decouple_demo(output / "decouple", minutes=decouple_minutes)


def _infer(output: Path, model: str | None, *, wants_testbed: bool) -> None:
    from rich.console import Console

    from isthmus.inference.demo import NUM_DEVICES, LocalProcesses, run_infer_demo
    from isthmus.spec.errors import IsthmusError
    from isthmus.testbed import DeviceSpec, Testbed, TestbedSpec
    from isthmus.testbed.processes import Interrupted
    from isthmus.testbed.setting_up import ended_by_signals

    console = Console(stderr=True)
    console.rule("one request on several weak devices")
    device = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=1e9)
    spec = TestbedSpec(name="demo", devices=(device,) * NUM_DEVICES)
    with ended_by_signals(), ExitStack() as stack:
        testbed, reason = None, "asked for with --processes"
        if wants_testbed:
            try:
                testbed = stack.enter_context(Testbed.up(spec))
            except IsthmusError as error:
                reason = str(error)
        if testbed is None:
            console.print(
                f"plain processes of this machine, neither they nor their links limited: {reason}", soft_wrap=True
            )
            run_infer_demo(output, devices=LocalProcesses(NUM_DEVICES), model=model)
            return
        console.print(f"testbed of {NUM_DEVICES} devices with {device.cpu_share:g} core each")
        try:
            run_infer_demo(output, devices=testbed, set_bandwidth=testbed.set_bandwidth, model=model)
        except Interrupted as interrupted:
            raise typer.Exit(interrupted.exit_code) from interrupted
