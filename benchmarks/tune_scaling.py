"""Strong scaling of ``isthmus tune`` over emulated devices: the same steps on one, two and four of them.

Raises a testbed (root) whose devices have a core share and a link each, and fine-tunes one model of random weights on
one device, on two and on four, in turns. Every device is a process that computes in place; stages loop over
them (APTMoE, section 3), activations travel. One device is measured while the other three do the same, each by itself,
on the cores where four together have them: devices of one host slow each other down (shared caches, turns on one core),
as real ones would not. Seconds of a step
are the first device's, from its begin until all devices have told what they did; the first two steps of a run are not
counted. The bound on D devices is one device's seconds ÷ D, times (M·R + D - 1) ÷ (M·R) for M micro-batches and R
stages a device, in which a pipeline fills and drains. Nothing else should run on the host: the table says how much of
its cores the devices are promised together.

    sudo python benchmarks/tune_scaling.py [--share 0.45] [--mbit 1000] [--repeats 2] [--micro-batches 16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from testbed_runs import run_once, tune_command, write_results

from isthmus.testbed import DeviceSpec, Testbed, TestbedSpec

NUM_DEVICES = (1, 2, 4)
NUM_LAYERS = 8
WARM_STEPS = 2


def step_seconds(testbed: Testbed, folder: Path, options: argparse.Namespace, number: int, repeat: int) -> list[float]:
    """Of each step that counts, on ``number`` devices."""
    output = folder / f"{number}-{repeat}"
    more: dict[str, object] = {"--num-stages": NUM_LAYERS, "--micro-batch-size": options.micro_batch_size}
    if number == 1 and options.alone_in_flight:
        more["--micro-batches-in-flight"] = options.alone_in_flight
    command = tune_command(folder, options, WARM_STEPS + options.steps, more)
    if number > 1:
        devices, place, shell = range(number), output, f"cd '{output}'; exec"
    else:
        devices, place = range(max(NUM_DEVICES)), output / "0"
        own = f"'{output}'/$ISTHMUS_DEVICE"
        shell = f"unset WORLD_SIZE RANK; mkdir -p {own}; cd {own}; exec"
    report = run_once(
        testbed,
        ["sh", "-c", f'{shell} "$@"', "sh", *command],
        place / "report.json",
        cache=folder / "cache",
        again=True,
        devices=devices,
    )
    return [step["duration_s"] for step in report["steps"][WARM_STEPS:]]


def table(found: dict[int, list[float]], options: argparse.Namespace) -> str:
    alone_s = statistics.median(found[1])
    lines = [
        f"# Strong scaling of isthmus tune: {options.share} cores and {options.mbit} Mbit/s a device",
        "",
        f"{NUM_LAYERS} layers, a stage each, {options.micro_batches} micro-batches of "
        f"{options.micro_batch_size * options.seq_len} tokens, fp32, "
        f"in place. Four devices are promised {max(NUM_DEVICES) * options.share:.2f} of {os.cpu_count()} cores.",
        "",
        "| devices | bound, s | step, s (p10–p90) | speed-up | of the bound |",
        "|---|---:|---:|---:|---:|",
    ]
    for number, seconds in found.items():
        pieces = options.micro_batches * NUM_LAYERS // number
        bound_s = alone_s / number * (pieces + number - 1) / pieces
        median_s, deciles = statistics.median(seconds), statistics.quantiles(seconds, n=10)
        lines.append(
            f"| {number} | {bound_s:.3f} | {median_s:.3f} ({deciles[0]:.3f}–{deciles[-1]:.3f}) | "
            f"{alone_s / median_s:.2f} | {bound_s / median_s:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/tune_scaling"))
    parser.add_argument("--share", type=float, default=0.45, help="cores of each device")
    parser.add_argument("--mbit", type=float, default=1000.0, help="of each device's link")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences of each")
    parser.add_argument(
        "--alone-in-flight",
        type=int,
        help="micro-batches in flight on one device, which else keeps all activations; four are measured at once",
    )
    options = parser.parse_args()
    options.output = options.output.resolve()
    device = DeviceSpec(cpu_share=options.share, bandwidth_bits_per_s=options.mbit * 1e6)
    spec = TestbedSpec(name="scaling", devices=(device,) * max(NUM_DEVICES), cpu_quota_s=1e-3)
    found: dict[int, list[float]] = {number: [] for number in NUM_DEVICES}
    with Testbed.up(spec, replace=True) as testbed:
        for repeat in range(options.repeats):
            for number in NUM_DEVICES:
                found[number] += step_seconds(testbed, options.output, options, number, repeat)
                print(f"{number} devices: {statistics.median(found[number]):.3f} s a step", file=sys.stderr)
    numbers = {f"{number}_devices_step_s": seconds for number, seconds in found.items()}
    write_results(
        options.output,
        "tune_scaling",
        table(found, options),
        {"options": vars(options) | {"output": str(options.output)}, **numbers},
    )


if __name__ == "__main__":
    main()
