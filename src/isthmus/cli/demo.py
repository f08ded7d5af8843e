"""``isthmus demo``: a working example of every part from nothing, pictures included."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes; an earlier demo there is replaced.")] = Path(
        "demo-out"
    ),
    only: Annotated[
        Literal["tune", "infer", "decouple", "latency"] | None,
        typer.Option(help="One of the parts; latency takes what decouple has left. Left out: all, in this order."),
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
        bool,
        typer.Option(
            "--processes", help="For infer and latency: plain processes, also where a testbed could be raised."
        ),
    ] = False,
) -> None:
    """Fine-tune a small Mixture-of-Experts model on real text, draw what happened and compare the policies; then answer
    one request on four weak devices in every way; then train and decouple a small model, in three minutes; then answer
    with that model and its copy, from wide links to narrow ones. Devices are emulated as root, else plain processes.
    Nine minutes on two cores."""
    if only in (None, "tune"):
        from isthmus.tuning.demo import run_demo

        run_demo(output, text=text, steps=steps)
    if only in (None, "infer"):
        _infer(output / "infer", model, wants_testbed=not processes)
    if only in (None, "decouple"):
        _decouple(output / "decouple", decouple_minutes)
    if only in (None, "latency"):
        _latency(output / "latency", output / "decouple", wants_testbed=not processes)


def _infer(output: Path, model: str | None, *, wants_testbed: bool) -> None:
    from isthmus.inference.demo import run_infer_demo

    _rule("one request on several weak devices")
    _on_devices(partial(run_infer_demo, output, model=model), wants_testbed=wants_testbed)


def _decouple(output: Path, minutes: float) -> None:
    from isthmus.decoupling.demo import run_decouple_demo

    _rule("a small model decoupled into four sub-blocks that hardly ever communicate")
    run_decouple_demo(output, minutes=minutes)


def _latency(output: Path, decoupled: Path, *, wants_testbed: bool) -> None:
    from isthmus.decoupling.demo import demo_models
    from isthmus.inference.demo import run_latency_demo

    model, copy = demo_models(decoupled)
    _rule("that model and its decoupled copy on several weak devices")
    _on_devices(partial(run_latency_demo, output, model=model, decoupled=copy), wants_testbed=wants_testbed)


def _rule(title: str) -> None:
    from rich.console import Console

    Console(stderr=True).rule(title)


def _on_devices(run: partial[None], *, wants_testbed: bool) -> None:
    """``run`` with the ``devices`` of a testbed and how to ``set_bandwidth`` of their links, or plain processes."""
    from rich.console import Console

    from isthmus.inference.demo import NUM_DEVICES, LocalProcesses
    from isthmus.spec.errors import IsthmusError
    from isthmus.testbed import DeviceSpec, Testbed, TestbedSpec
    from isthmus.testbed.processes import Interrupted
    from isthmus.testbed.setting_up import ended_by_signals

    console = Console(stderr=True)
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
            run(devices=LocalProcesses(NUM_DEVICES))
            return
        console.print(f"testbed of {NUM_DEVICES} devices with {device.cpu_share:g} core each")
        try:
            run(devices=testbed, set_bandwidth=testbed.set_bandwidth)
        except Interrupted as interrupted:
            raise typer.Exit(interrupted.exit_code) from interrupted
