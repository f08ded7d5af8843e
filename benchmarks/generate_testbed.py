"""Generation on a testbed of weak devices: first token and each further one, one device and four, against transformers.

Raises a testbed (root) and runs one process per device. The model is a Llama of random weights (12 layers, hidden 768,
MLP 2048, 12 heads, vocabulary 32000, 134M parameters); prompts are random tokens, batch 1, greedy. The bound is time
to read the weights that one token needs at the rate at which a device reads memory, measured in place, without
exchanges. ``cpu`` is the time that the first device's process itself worked per token, its other threads included.

    python benchmarks/generate_testbed.py [--cells 4:1000:int8:fp32,1:1000:fp32:fp32] [--new-tokens 64] [--quota-ms 1]

A cell is devices:Mbit/s:dtype:codec, or 1:1000:fp32:transformers for transformers' own ``generate``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from testbed_runs import llama, random_model

from isthmus.inference.engine import Engine
from isthmus.inference.kernels import load_kernels
from isthmus.inference.linear import make_linear
from isthmus.models.shards import ShardReader
from isthmus.profiling.steady import steady_s
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan
from isthmus.testbed import DeviceSpec, Testbed, TestbedSpec
from isthmus.transport.sockets import SocketGroup

CELLS = ",".join(
    [
        *("1:1000:fp32:transformers", "1:1000:fp32:fp32", "1:1000:int8:fp32"),
        *(f"4:1000:{dtype}:fp32" for dtype in ("fp32", "int8")),
        *(f"4:125:{dtype}:{codec}" for dtype in ("fp32", "int8") for codec in ("fp32", "bf16", "int8")),
    ]
)
_MEMORY_BYTES = 64 << 20


# --- on a device -----------------------------------------------------------------------------------------------------


class Stopwatch:
    """Notes when tokens come."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.times_s = [time.perf_counter()]
        self.cpu_s = [time.process_time()]

    def tick(self, ids: list[int]) -> bool:
        self.times_s.append(time.perf_counter())
        self.cpu_s.append(time.process_time())
        return False

    def result(self) -> tuple[float, list[float], list[float]]:
        """Seconds to the first token, and seconds and CPU seconds of each further one."""
        gaps = [[late - early for early, late in pairwise(of[1:])] for of in (self.times_s, self.cpu_s)]
        return self.times_s[1] - self.times_s[0], gaps[0], gaps[1]


def memory_bytes_per_s() -> float:
    """At which this device reads memory: the faster of a sum and of the products of a token."""
    weight = torch.randn(_MEMORY_BYTES // 4 // 1024, 1024)
    x = torch.randn(1, 1024)
    tasks = [weight.sum, partial(make_linear(weight, None, "fp32", load_kernels()), x)]
    return weight.nbytes / min(steady_s(task, window_s=0.1) for task in tasks)


def run_isthmus(arguments: argparse.Namespace, measure: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    with contextlib.ExitStack() as stack:
        group, num_devices = None, int(os.environ["WORLD_SIZE"])
        if num_devices > 1:
            digest = ShardReader(arguments.model).digest()
            group = stack.enter_context(SocketGroup.from_environment(digest=digest))
        plan = InferencePlan.even("tensor", num_devices, codec=arguments.codec, dtype=arguments.dtype)
        engine = stack.enter_context(Engine(arguments.model, group=group, plan=plan))
        if not engine.is_leader:
            engine.follow()
            return None

        def generate(ids_BT: torch.Tensor, num_new: int, tick: Callable[[list[int]], bool]) -> None:
            engine.generate_tokens(ids_BT, torch.ones_like(ids_BT), GenerationSettings(max_new_tokens=num_new), tick)

        row = measure(generate)
        if group is not None:
            row["sent_bytes_per_token"] = round(group.stats.bytes_sent / row["num_steps"])
        return row


def run_transformers(arguments: argparse.Namespace, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(arguments.model)

    def generate(ids_BT: torch.Tensor, num_new: int, tick: Callable[[list[int]], bool]) -> None:
        class Streamer(BaseStreamer):
            has_prompt = False

            def put(self, value: torch.Tensor) -> None:
                if self.has_prompt:
                    tick(value.tolist())
                self.has_prompt = True

            def end(self) -> None:
                pass

        mask_BT = torch.ones_like(ids_BT)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
        generate(ids_BT, attention_mask=mask_BT, max_new_tokens=num_new, streamer=Streamer(), **options)

    return measure(generate)


def run_device(arguments: argparse.Namespace) -> None:
    def measure(generate: Callable[..., None]) -> dict[str, Any]:
        ids_BT = torch.randint(3, 32000, (1, arguments.prompt_tokens), generator=torch.Generator().manual_seed(0))
        stopwatch = Stopwatch()
        first_s, token_s, cpu_s = [], [], []
        num_steps = 0
        for turn in range(arguments.requests + 1):
            stopwatch.start()
            generate(ids_BT, arguments.new_tokens if turn else 8, stopwatch.tick)
            num_steps += len(stopwatch.times_s) - 1
            first, gaps, cpu_gaps = stopwatch.result()
            if turn:
                first_s.append(first)
                token_s += gaps
                cpu_s += cpu_gaps
        return {
            "first_token_ms": round(statistics.median(first_s) * 1e3, 2),
            "token_ms": round(statistics.median(token_s) * 1e3, 3),
            "token_mean_ms": round(statistics.fmean(token_s) * 1e3, 3),
            "token_p90_ms": round(statistics.quantiles(token_s, n=10)[8] * 1e3, 3),
            "cpu_ms": round(statistics.fmean(cpu_s) * 1e3, 3),
            "peak_memory_mib": round(psutil.Process().memory_info().rss / 2**20),
            "num_steps": num_steps,
        }

    run = run_transformers if arguments.codec == "transformers" else run_isthmus
    row = run(arguments, measure)
    if row is not None:
        print(json.dumps(row | {"memory_bytes_per_s": round(memory_bytes_per_s())}), flush=True)


# --- the testbed -----------------------------------------------------------------------------------------------------


def run_cell(testbed: Testbed, cell: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    devices, mbit, dtype, codec = cell.split(":")
    testbed.set_bandwidth(float(mbit))
    options = ["--model", str(directory / "model"), "--dtype", dtype, "--codec", codec]
    options += ["--new-tokens", str(arguments.new_tokens), "--requests", str(arguments.requests)]
    output = directory / "output"
    argv = [sys.executable, *arguments.python, str(Path(__file__).resolve()), "--device", *options]
    outcome = testbed.run(argv, devices=range(int(devices)), output=output, timeout_s=arguments.timeout)
    if outcome.exit_code:
        raise SystemExit("\n".join(path.read_text() for path in sorted(output.glob("*.err"))))
    row = json.loads((output / "device-0.out").read_text().splitlines()[-1])
    weights = 12 * (4 * 768**2 + 3 * 768 * 2048) + 32000 * 768
    num_bytes = weights * (1 if dtype == "int8" else 4) / int(devices)
    row["bound_ms"] = round(num_bytes / row["memory_bytes_per_s"] * 1e3, 2)
    row["bound_share"] = round(row["bound_ms"] / row["token_ms"], 3)
    return {"devices": int(devices), "mbit_per_s": float(mbit), "dtype": dtype, "codec": codec} | row


def run_all(arguments: argparse.Namespace) -> None:
    cells = arguments.cells.split(",")
    num_devices = max(int(cell.split(":")[0]) for cell in cells)
    device = DeviceSpec(cpu_share=arguments.cpu, bandwidth_bits_per_s=1e9)
    spec = TestbedSpec(name="generate", devices=(device,) * num_devices, cpu_quota_s=arguments.quota_ms / 1e3)
    rows = []
    with tempfile.TemporaryDirectory() as name, Testbed.up(spec, replace=True) as testbed:
        random_model(Path(name) / "model", llama())
        for cell in cells:
            row = run_cell(testbed, cell, arguments, Path(name))
            rows.append(row)
            print(
                f"{cell:28} bound {row['bound_ms']:6.2f} ms  token {row['token_ms']:7.2f} ms (mean "
                f"{row['token_mean_ms']:.2f}, p90 {row['token_p90_ms']:.2f}, cpu {row['cpu_ms']:.2f}) = "
                f"{row['bound_share']:.0%} of the bound, first token {row['first_token_ms']:7.1f} ms",
                flush=True,
            )
    print(json.dumps({"benchmark": "generate", "cpu_share": arguments.cpu, "rows": rows}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--cpu", type=float, default=0.45, help="cores of a device")
    parser.add_argument("--quota-ms", type=float, default=1.0)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--python", nargs="*", default=[], help="options of the devices' Python, such as -X importtime")
    parser.add_argument("--device", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--codec", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_device(arguments) if arguments.device else run_all(arguments)


if __name__ == "__main__":
    main()
