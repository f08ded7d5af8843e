"""Step times that ``isthmus plan tune`` predicts beside those of ``isthmus tune``, on this host.

For every configuration a model of random weights is fine-tuned for a few steps by 1, 2 or 4 processes (torchrun), on an
emulated accelerator or in place, and the same command line is given to ``isthmus plan tune``, with the popularity that
the run recorded. Measured are the steps after the first ones; a prediction is told nothing of them. The machine should
have nothing else to do.

A virtual machine's cores may share a last-level cache at one time and not at another: products whose weights fill that
cache then take a fifth longer, and steps with them. So such products are timed before and after every run and every
profile; where they differ by more than ``MOST_CHANGE`` both are done again, and a configuration that never had one
machine for both is shown but not judged.

    python benchmarks/tune_predicted.py [--only NAME,…] [--set judged|built] [--part run|plan]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from testbed_runs import moe_and_text, write_results

WARM_STEPS = 3
NUM_STEPS = 10
RUN_TIMEOUT_S = 150.0
MOST_ERROR = 0.10
MOST_CHANGE = 1.08
"""Of what products take that are timed meanwhile."""
MAX_TRIES = 3
NUM_ROUNDS, NUM_PRODUCTS, PROBE_TOKENS, PROBE_SHAPE = 5, 40, 128, (1024, 4096)
"""Weights of 16 MiB. The best round counts: some take 3.6 times as long, probably with both threads on one core."""


@dataclass(frozen=True)
class Configuration:
    """One line of the table. ``memory``: of each emulated accelerator; "": in place, without one."""

    name: str
    model: str
    processes: int
    memory: str
    rate: str
    seq_len: int
    sequences: int
    micro_batches: int
    policy: str
    stages: int | None = None
    in_flight: int | None = None
    """Micro-batches; None: as many as fit."""
    is_judged: bool = True
    """Not used to build the model of a step."""

    def options(self) -> list[str]:
        """What both commands are given."""
        found: dict[str, object] = {
            "--seq-len": self.seq_len,
            "--micro-batch-size": self.sequences,
            "--micro-batches": self.micro_batches,
            "--policy": self.policy,
            "--dtype": "fp32",
            "--accelerator": "emulated" if self.memory else "host",
        }
        if self.memory:
            found["--accelerator-memory"] = self.memory
            found["--emulate"] = f"h2d={self.rate},d2h={self.rate},latency=20us"
        if self.stages is not None:
            found["--num-stages"] = self.stages
        if self.in_flight is not None:
            found["--micro-batches-in-flight"] = self.in_flight
        return [str(part) for item in found.items() for part in item]


CONFIGURATIONS = (
    # Used to find out what the model of a step lacked.
    Configuration("b1", "qwen3", 1, "2GiB", "2GB/s", 256, 1, 4, "affinity", is_judged=False),
    Configuration("b2", "mixtral", 1, "", "", 256, 1, 4, "affinity", is_judged=False),
    Configuration("b3", "qwen3", 2, "2GiB", "1GB/s", 256, 1, 4, "affinity", is_judged=False),
    Configuration("b4", "mixtral", 4, "", "", 128, 2, 4, "affinity", is_judged=False),
    Configuration("j11", "qwen3", 2, "", "", 256, 1, 8, "affinity", is_judged=False),
    # Judged.
    Configuration("j1", "qwen3", 1, "430MiB", "1GB/s", 256, 2, 4, "affinity"),
    Configuration("j2", "qwen3", 1, "430MiB", "1GB/s", 256, 2, 4, "paper"),
    Configuration("j3", "mixtral", 1, "2GiB", "500MB/s", 128, 2, 2, "mobius"),
    Configuration("j4", "mixtral", 1, "220MiB", "2GB/s", 512, 1, 2, "affinity"),
    Configuration("j5", "qwen3", 1, "2GiB", "4GB/s", 128, 2, 8, "paper"),
    Configuration("j6", "qwen3", 1, "", "", 512, 1, 4, "affinity"),
    Configuration("j7", "mixtral", 1, "", "", 128, 1, 8, "affinity"),
    Configuration("j8", "qwen3", 2, "2GiB", "2GB/s", 128, 2, 8, "mobius"),
    Configuration("j9", "mixtral", 2, "400MiB", "500MB/s", 256, 1, 4, "affinity"),
    Configuration("j10", "mixtral", 2, "400MiB", "2GB/s", 256, 1, 4, "paper"),
    Configuration("j12", "mixtral", 2, "", "", 512, 1, 2, "affinity"),
    Configuration("j13", "qwen3", 4, "440MiB", "1GB/s", 128, 2, 4, "affinity"),
    Configuration("j14", "qwen3", 4, "2GiB", "2GB/s", 256, 1, 4, "mobius"),
    Configuration("j15", "qwen3", 4, "", "", 256, 1, 8, "affinity"),
    Configuration("j16", "mixtral", 4, "", "", 256, 1, 4, "affinity"),
    # Flights: where all fits the accelerator, and where little does.
    Configuration("f8", "qwen3", 1, "1GiB", "2GB/s", 128, 1, 8, "affinity", in_flight=8),
    Configuration("f4", "qwen3", 1, "1GiB", "2GB/s", 128, 1, 8, "affinity", in_flight=4),
    Configuration("f1", "qwen3", 1, "1GiB", "2GB/s", 128, 1, 8, "affinity", in_flight=1),
    Configuration("t8", "qwen3", 1, "220MiB", "2GB/s", 128, 1, 8, "affinity", in_flight=8),
    Configuration("t4", "qwen3", 1, "220MiB", "2GB/s", 128, 1, 8, "affinity", in_flight=4),
    Configuration("t1", "qwen3", 1, "220MiB", "2GB/s", 128, 1, 8, "affinity", in_flight=1),
)


class MachineProbe:
    """Times products whose weights fill a last-level cache."""

    def __init__(self) -> None:
        self._rows, self._weights = torch.randn(PROBE_TOKENS, PROBE_SHAPE[0]), torch.randn(PROBE_SHAPE)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        self.seconds.append(min(self._round_s() for _ in range(NUM_ROUNDS)))

    def _round_s(self) -> float:
        time.sleep(0.1)
        seconds = []
        for _ in range(NUM_PRODUCTS):
            start_s = time.perf_counter()
            torch.mm(self._rows, self._weights)
            seconds.append(time.perf_counter() - start_s)
        return statistics.median(seconds)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Once before and once after."""
        self()
        yield
        self()

    @property
    def change(self) -> float:
        """The most it took, as a multiple of the least."""
        return max(self.seconds) / min(self.seconds)


class Bench:
    """Runs and plans, with what they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def compare(self, configuration: Configuration, parts: Sequence[str]) -> None:
        """Runs and plans until both had the same machine."""
        place = self.folder / configuration.name
        for _ in range(MAX_TRIES):
            shutil.rmtree(self.folder / "cache", ignore_errors=True)  # what is kept was measured at another time
            probe = MachineProbe()
            for part in parts:
                start_s = time.perf_counter()
                with probe.around():
                    {"run": self.run, "plan": self.plan}[part](configuration)
                print(f"{configuration.name} {part}: {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
            (place / "probe.json").write_text(json.dumps(probe.seconds))
            if probe.change <= MOST_CHANGE:
                return
            print(f"{configuration.name}: products took {probe.change:.2f} times the least", file=sys.stderr)

    def run(self, configuration: Configuration) -> None:
        """``isthmus tune``; keeps its report, popularity and timeline."""
        model, text = moe_and_text(configuration.model, self.folder / "models", num_characters=2_000_000)
        place = self.folder / configuration.name
        place.mkdir(parents=True, exist_ok=True)
        command = ["-m", "isthmus", "tune", str(model), "--data", str(text), *configuration.options()]
        if configuration.processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(configuration.processes)]
            command = [*launch, *command]
        output = place / "model"
        command += ["--output", str(output), "--report", str(place / "run.json"), "--steps", str(NUM_STEPS)]
        command += ["--trace", str(place / "popularity.npz"), "--timeline", str(place / "run-timeline.json")]
        self._call([*command, "--save-every", "0", "--overwrite", "--plain"], place / "run.log")
        shutil.rmtree(output)

    def plan(self, configuration: Configuration) -> None:
        """``isthmus plan tune``; keeps its report."""
        model, _ = moe_and_text(configuration.model, self.folder / "models", num_characters=2_000_000)
        place = self.folder / configuration.name
        command = ["-m", "isthmus", "plan", "tune", str(model), *configuration.options()]
        command += ["--num-devices", str(configuration.processes), "--popularity", str(place / "popularity.npz")]
        command += ["--report", str(place / "plan.json"), "--timeline", str(place / "plan-timeline.json")]
        self._call([*command, "--no-changes"], place / "plan.log")

    def _call(self, command: Sequence[str], log: Path) -> None:
        environment = os.environ | {"ISTHMUS_CACHE": str(self.folder / "cache"), "COLUMNS": "160"}
        environment.pop("OMP_NUM_THREADS", None)
        with log.open("w") as told:
            done = subprocess.run(
                [sys.executable, *command],
                env=environment,
                stdout=told,
                stderr=subprocess.STDOUT,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: see {log}")

    def row(self, configuration: Configuration) -> dict[str, Any] | None:
        """Of the table; None before both have been run."""
        place = self.folder / configuration.name
        reports = [place / "run.json", place / "plan.json"]
        if not all(report.is_file() for report in reports):
            return None
        run, plan = (json.loads(report.read_text()) for report in reports)
        seconds = [step["duration_s"] for step in run["steps"][WARM_STEPS:]]
        deciles = statistics.quantiles(seconds, n=10)
        measured_s, predicted_s = statistics.median(seconds), plan["step"]["step_s"]
        probed = json.loads((place / "probe.json").read_text())
        change = max(probed) / min(probed)
        return asdict(configuration) | {
            "is_judged": configuration.is_judged and change <= MOST_CHANGE,
            "machine_change": change,
            "measured_s": measured_s,
            "measured_p10_s": deciles[0],
            "measured_p90_s": deciles[-1],
            "predicted_s": predicted_s,
            "error": predicted_s / measured_s - 1,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | model | processes | memory | link | tokens | policy | predicted, s | measured, s (p10–p90) | error | "
        "machine |",
        "|---|---|---:|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        tokens = f"{row['micro_batches']} × {row['sequences']} × {row['seq_len']}"
        policy = row["policy"] if row["memory"] else "in place"
        lines.append(
            f"| {row['name']} | {row['model']} | {row['processes']} | {row['memory'] or '–'} | {row['rate'] or '–'} | "
            f"{tokens} | {policy} | {row['predicted_s']:.3f} | {row['measured_s']:.3f} ({row['measured_p10_s']:.3f}–"
            f"{row['measured_p90_s']:.3f}) | {row['error']:+.0%} | {row['machine_change']:.2f} |"
        )
    for name, is_judged in (("judged", True), ("not judged", False)):
        errors = [abs(row["error"]) for row in rows if row["is_judged"] is is_judged]
        if errors:
            within = sum(error <= MOST_ERROR for error in errors)
            lines += [
                "",
                f"{name}: {within} of {len(errors)} within {MOST_ERROR:.0%}; median error "
                f"{statistics.median(errors):.1%}, worst {max(errors):.1%}",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/tune_predicted"))
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--set", choices=("all", "judged", "built"), default="all")
    parser.add_argument("--part", choices=("both", "run", "plan", "none"), default="both")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    chosen = [
        one
        for one in CONFIGURATIONS
        if (one.name in names or not names) and options.set in ("all", "judged" if one.is_judged else "built")
    ]
    bench = Bench(options.output)
    for configuration in chosen:
        if options.part != "none":
            bench.compare(configuration, ("run", "plan") if options.part == "both" else (options.part,))
    rows = [row for one in chosen if (row := bench.row(one)) is not None]
    if rows:
        write_results(bench.folder, "tune_predicted", table(rows), {"rows": rows})


if __name__ == "__main__":
    main()
