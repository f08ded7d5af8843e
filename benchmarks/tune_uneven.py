"""Layers by measured times beside equal stages: ``isthmus tune`` on two emulated devices, one of half the cores.

Raises a testbed (root) of two devices and fine-tunes one model of random weights on both, in place, with layers mapped
by what each device measures of itself (``affinity``), and with stages of equal size (``paper``; in place the two differ
in nothing else), in turns. Seconds of a step are the first device's; the first two of a run are not counted. What is
predicted is said before the first step, from the profiles alone. Nothing else should run on the host.

    sudo python benchmarks/tune_uneven.py [--share 0.9] [--weak-share 0.45] [--repeats 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from testbed_runs import run_once, tune_command, write_results

from isthmus.testbed import DeviceSpec, Testbed, TestbedSpec

WARM_STEPS = 2
POLICIES = {"paper": "equal", "affinity": "by time"}


def report_of(testbed: Testbed, folder: Path, options: argparse.Namespace, policy: str, repeat: int) -> dict[str, Any]:
    output = folder / f"{policy}-{repeat}"
    command = tune_command(folder, options, WARM_STEPS + options.steps, {"--policy": policy})
    shell = ["sh", "-c", f"cd '{output}'; exec \"$@\"", "sh", *command]
    return run_once(testbed, shell, output / "report.json", cache=folder / "cache", again=True)


def layers_of(mapping: dict[str, Any], rank: int) -> int:
    stages = zip(mapping["stages"], mapping["ranks"], strict=True)
    return sum(stage["last_layer"] - stage["first_layer"] + 1 for stage, whose in stages if whose == rank)


def table(found: dict[str, list[float]], mappings: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    timed = mappings["affinity"]
    predicted_s = {"paper": timed["equal_stages_step_s"], "affinity": timed["step_s"]}
    lines = [
        f"# Layers by measured times: devices of {options.share} and {options.weak_share} cores",
        "",
        f"8 layers in {len(timed['stages'])} stages, {options.micro_batches} micro-batches of {options.seq_len} "
        "tokens, fp32, in place.",
        "",
        "| stages | layers of each | predicted, s | step, s (least–most) | as fast as equal stages |",
        "|---|---|---:|---:|---:|",
    ]
    equal_s = statistics.median(found["paper"])
    for policy, seconds in found.items():
        median_s = statistics.median(seconds)
        layers = ", ".join(str(layers_of(mappings[policy], rank)) for rank in range(2))
        lines.append(
            f"| {POLICIES[policy]} | {layers} | {predicted_s[policy]:.3f} | {median_s:.3f} "
            f"({min(seconds):.3f}–{max(seconds):.3f}) | {equal_s / median_s:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/tune_uneven"))
    parser.add_argument("--share", type=float, default=0.9, help="cores of the first device")
    parser.add_argument("--weak-share", type=float, default=0.45, help="of the second")
    parser.add_argument("--mbit", type=float, default=1000.0, help="of each device's link")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=8)
    options = parser.parse_args()
    options.output = options.output.resolve()
    shares = options.share, options.weak_share
    devices = tuple(DeviceSpec(cpu_share=share, bandwidth_bits_per_s=options.mbit * 1e6) for share in shares)
    found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    mappings: dict[str, dict[str, Any]] = {}
    with Testbed.up(TestbedSpec(name="uneven", devices=devices, cpu_quota_s=1e-3), replace=True) as testbed:
        for repeat in range(options.repeats):
            for policy in POLICIES:
                report = report_of(testbed, options.output, options, policy, repeat)
                found[policy] += [step["duration_s"] for step in report["steps"][WARM_STEPS:]]
                mappings[policy] = report["mapping"]
                print(f"{POLICIES[policy]}: {statistics.median(found[policy]):.3f} s a step", file=sys.stderr)
    numbers = {f"{policy}_step_s": seconds for policy, seconds in found.items()}
    content = {"options": vars(options) | {"output": str(options.output)}, "mapping": mappings["affinity"], **numbers}
    write_results(options.output, "tune_uneven", table(found, mappings, options), content)


if __name__ == "__main__":
    main()
