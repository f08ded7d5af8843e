"""``isthmus testbed``: weak devices with slow links on one Linux host. What is done is in ``isthmus.testbed``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Option(help="Keeps several testbeds on one host apart.", metavar="NAME")]
Numbers = Annotated[
    str | None, typer.Option("--device", help="Only these, such as [b]0,2[/]. Left out: all.", metavar="N,N")
]
Devices = Annotated[int | None, typer.Option(help="This many equal devices.", min=1, metavar="N")]
Device = Annotated[
    list[str] | None,
    typer.Option(
        help="One device: [b]cpu=0.2,bandwidth=60mbit,memory=1GiB,delay=1ms[/]; once per device, in place of "
        "--devices. What is left out is taken from the options below.",
        metavar="KEY=VALUE,…",
    ),
]
Cpu = Annotated[str | None, typer.Option(help="Cores of each device: 0.45 is 45 % of one.", metavar="CORES")]
Bandwidth = Annotated[
    str | None, typer.Option(help="Of each device's link, both ways: [b]125mbit[/], [b]1gbit[/].", metavar="RATE")
]
Memory = Annotated[
    str | None, typer.Option(help="Of each device, such as [b]2GiB[/]. Left out: not limited.", metavar="SIZE")
]
Delay = Annotated[
    str | None, typer.Option(help="Holds back what a device sends, such as [b]1ms[/]; needs netem.", metavar="DURATION")
]
Subnet = Annotated[
    str | None, typer.Option(help="A private /24. Left out: a free one of 10.213.0.0/16.", metavar="NETWORK")
]
Quota = Annotated[
    str,
    typer.Option(
        help="How long a device computes at full speed before it must pause. Short ones are more like a slow CPU, "
        "but may give less than was asked for: compare what is measured.",
        metavar="DURATION",
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Remove a testbed of that name first.")]
Measure = Annotated[bool, typer.Option(help="Measure what was set up, about 3 s a device.")]
Report = Annotated[Path | None, typer.Option(help="Write what was asked and measured here as JSON.", metavar="FILE")]


@app.callback()
def testbed() -> None:
    """Emulate weak devices with slow links on this host, and run commands on them (Linux, root).

    Each device is a network namespace with a limited link to a bridge and control groups for CPU and memory.

        sudo isthmus testbed up --devices 4 --cpu 0.45 --bandwidth 125mbit
        sudo isthmus testbed run -- python -c 'import os; print(os.environ["RANK"])'
        sudo isthmus testbed down
    """


@app.command()
def up(
    devices: Devices = None,
    device: Device = None,
    cpu: Cpu = None,
    bandwidth: Bandwidth = None,
    memory: Memory = None,
    delay: Delay = None,
    name: Name = "isthmus",
    subnet: Subnet = None,
    quota: Quota = "1ms",
    replace: Replace = False,
    measure: Measure = True,
    report: Report = None,
) -> None:
    """Set a testbed up, measure it and print both. It stands until `down`.

    sudo isthmus testbed up --devices 4 --cpu 0.45 --bandwidth 125mbit --memory 2GiB
    sudo isthmus testbed up --device cpu=0.2,bandwidth=60mbit --device cpu=0.6,bandwidth=100mbit
    """
    options = dict(locals())
    from isthmus.testbed.setting_up import set_up

    set_up(**options)


@app.command()
def status(name: Name = "isthmus") -> None:
    """Print a testbed, what was measured of it, and what of it is alive. Exits with 1 when part of it is gone."""
    from rich.console import Console

    from isthmus.testbed.table import testbed_table
    from isthmus.testbed.testbed import Testbed

    standing = Testbed.load(name)
    statuses = standing.status()
    Console().print(testbed_table(standing.state, statuses))
    if not all(device.is_alive for device in statuses):
        raise typer.Exit(1)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="What to run, with its arguments, after [b]--[/].")],
    device: Numbers = None,
    timeout: Annotated[float | None, typer.Option(help="End it after so many seconds.", min=0, metavar="S")] = None,
    grace: Annotated[
        float, typer.Option(help="Seconds to end in, before SIGTERM and again before SIGKILL.", min=0, metavar="S")
    ] = 10.0,
    quiet_others: Annotated[
        bool, typer.Option("--quiet-others", help="Hide what all but the first write to stdout.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write each device's output to files here instead.", metavar="DIR")
    ] = None,
    master_port: Annotated[int, typer.Option(help="MASTER_PORT.", min=1, max=65535, metavar="PORT")] = 29500,
    name: Name = "isthmus",
) -> None:
    """Run a command once per device, at the same time, with the variables that torchrun sets.

    RANK counts the chosen devices, MASTER_ADDR is the first one's address, ISTHMUS_DEVICE the device's number. Output
    of all but the first has the number in front. When one fails, the others are ended; the exit code is the one of the
    device that failed first, 124 after the timeout. Nothing goes on running afterwards.

        sudo isthmus testbed run --device 0,2 --timeout 60 -- python train.py --steps 10
    """
    from isthmus.testbed.asking import parse_device_numbers
    from isthmus.testbed.processes import Interrupted
    from isthmus.testbed.testbed import Testbed

    standing = Testbed.load(name)
    try:
        outcome = standing.run(
            command,
            devices=None if device is None else parse_device_numbers(device),
            output=output,
            quiet_others=quiet_others,
            timeout_s=timeout,
            grace_s=grace,
            master_port=master_port,
        )
    except Interrupted as interrupted:
        typer.echo(f"{interrupted}; nothing of it is left", err=True)
        raise typer.Exit(interrupted.exit_code) from interrupted
    if outcome.failed_device is not None:
        told = f"device {outcome.failed_device} failed first, with exit code {outcome.exit_code}"
        memory_bytes = standing.state.spec.devices[outcome.failed_device].memory_bytes
        if outcome.exit_code == 128 + signal.SIGKILL and memory_bytes is not None:
            told += f": killed, probably for taking more than its {memory_bytes / 2**20:.0f} MiB of memory"
        typer.echo(told, err=True)
    elif outcome.has_timed_out:
        typer.echo(f"ended after {timeout:g} s", err=True)
    raise typer.Exit(outcome.exit_code)


@app.command()
def limit(
    bandwidth: Bandwidth = None,
    cpu: Cpu = None,
    device: Numbers = None,
    name: Name = "isthmus",
) -> None:
    """Change the limits of a standing testbed, at once and also under what runs on it.

    sudo isthmus testbed limit --bandwidth 50mbit --device 0,1
    """
    from isthmus.spec.units import parse_bits_per_s
    from isthmus.testbed.asking import parse_cpu, parse_device_numbers
    from isthmus.testbed.testbed import Testbed

    if bandwidth is None and cpu is None:
        raise typer.BadParameter("nothing to change; give --bandwidth, --cpu or both")
    standing = Testbed.load(name)
    numbers = None if device is None else parse_device_numbers(device)
    if bandwidth is not None:
        standing.set_bandwidth(parse_bits_per_s(bandwidth) / 1e6, numbers)
    if cpu is not None:
        standing.set_cpu(parse_cpu(cpu), numbers)


@app.command()
def down(name: Name = "isthmus") -> None:
    """Remove a testbed, what runs on it, and what a crash may have left of it. Not an error when there is none."""
    from isthmus.testbed.setting_up import take_down

    take_down(name)
