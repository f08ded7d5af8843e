"""CPU AdamW on the parameter store against ``torch.optim.AdamW(fused=True)`` on one flat FP32 tensor of the same size.

The bound is memory: 28 bytes per parameter (FP32: read weight, gradient and two moments, write all but the gradient;
bf16: read master, moments and a 2-byte gradient, write master, moments and a 2-byte weight) at the rate of a plain
``a + b -> c``. Runs are interleaved, and torch works on the store's own memory, so that a slow moment or a slow place
in memory (a factor of two was seen on a virtual machine) meets both sides.

    python benchmarks/optimizer.py [--parameters 32] [--repetitions 15] [--threads 1,2]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore

BYTES_PER_PARAMETER = 28


@dataclass(frozen=True)
class Case:
    dtype: str
    unit_numel: int
    is_clipped: bool

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.unit_numel / 1e6:g}M-units {'clipped' if self.is_clipped else 'unclipped'}"


class StoreSide:
    """Our optimizer over ``num_parameters`` in equal units, whose gradients are there and stay."""

    def __init__(self, case: Case, num_parameters: int) -> None:
        unit = UnitLayout(tensors=(TensorSpec(name="w", shape=(case.unit_numel,)),), dtype=case.dtype)
        layouts = {UnitKey(0, expert): unit for expert in range(num_parameters // case.unit_numel)}
        self.store = ParameterStore(layouts, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
        self.optimizer = StoreOptimizer(self.store, learning_rate=1e-4, clip_norm=1e-3 if case.is_clipped else None)
        for key in self.store.keys:
            self.store.master(key).normal_()
            self.store.publish(key)
            self.store.gradient(key).normal_()

    def norms(self) -> None:
        for key in self.store.keys:
            self.optimizer.gradient_destination(key)
            self.optimizer.finish_gradient(key)

    def step(self) -> None:
        self.optimizer.step_units(self.store.keys)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_side(store: ParameterStore, num_parameters: int) -> Callable[[], object]:
    """AdamW over the masters and moments of all units as one flat tensor: they lie one after the other in one slab."""

    (run,) = store.runs(store.keys)
    parameter = torch.nn.Parameter(store.span("master", run))
    gradient = store.span("gradient", run)
    parameter.grad = gradient if gradient.dtype == torch.float32 else torch.randn(num_parameters)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0, fused=True)
    moments = {kind: store.span(kind, run) for kind in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer.step


def bandwidth_bytes_per_s(repetitions: int) -> float:
    first, second, out = (torch.randn(1 << 25) for _ in range(3))
    times = [seconds(lambda: torch.add(first, second, out=out)) for _ in range(repetitions)]
    return 3 * out.nbytes / statistics.median(times)


def spread(times: list[float], num_parameters: int) -> dict[str, float]:
    """Milliseconds per million parameters: median, 10th and 90th percentile."""
    deciles = statistics.quantiles([time_s * 1e9 / num_parameters for time_s in times], n=10)
    return {"median": round(deciles[4], 4), "p10": round(deciles[0], 4), "p90": round(deciles[8], 4)}


def measure(case: Case, num_parameters: int, repetitions: int, bandwidth: float) -> dict:
    ours = StoreSide(case, num_parameters)
    reference = torch_side(ours.store, num_parameters)
    times: dict[str, list[float]] = {"torch": [], "store": [], "norm": []}
    for repetition in range(repetitions + 1):
        reference_s = seconds(reference)
        norm_s = seconds(ours.norms)
        ours.optimizer.begin_step(repetition + 1)
        step_s = seconds(ours.step)
        ours.optimizer.end_step()
        if repetition:  # the first round touches the moments' pages
            times["torch"].append(reference_s)
            times["store"].append(step_s)
            times["norm"].append(norm_s)
    ratios = [store_s / torch_s for store_s, torch_s in zip(times["store"], times["torch"], strict=True)]
    rate = BYTES_PER_PARAMETER * num_parameters / statistics.median(times["store"])
    return {
        "case": case.name,
        "num_threads": torch.get_num_threads(),
        "torch_flat_ms_per_million": spread(times["torch"], num_parameters),
        "store_ms_per_million": spread(times["store"], num_parameters),
        "norm_ms_per_million": spread(times["norm"], num_parameters),
        "ratio_median": round(statistics.median(ratios), 3),
        "store_bytes_per_s": round(rate),
        "bandwidth_share": round(rate / bandwidth, 3),
    }


def warm_up(num_s: float = 1.0) -> None:
    work: Tensor = torch.randn(1 << 22)
    end = time.perf_counter() + num_s
    while time.perf_counter() < end:
        work.mul_(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=32, help="millions of parameters (of 2**20)")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", default="1,2")
    arguments = parser.parse_args()
    num_parameters = arguments.parameters << 20
    unit_numels = (min(1 << 23, num_parameters), 1 << 15)
    cases = [Case(dtype, n, clip) for dtype in ("fp32", "bf16") for n in unit_numels for clip in (False, True)]
    rows = []
    for num_threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(num_threads)
        warm_up()
        bandwidth = bandwidth_bytes_per_s(arguments.repetitions)
        bound = BYTES_PER_PARAMETER * 1e9 / bandwidth
        print(f"{num_threads} threads: {bandwidth / 1e9:.1f} GB/s, bound {bound:.3f} ms per million parameters")
        for case in cases:
            row = measure(case, num_parameters, arguments.repetitions, bandwidth)
            rows.append(row)
            torch_ms, store_ms = row["torch_flat_ms_per_million"], row["store_ms_per_million"]
            print(
                f"  {case.name:32} torch {torch_ms['median']:.3f}  store {store_ms['median']:.3f} "
                f"[{store_ms['p10']:.3f}, {store_ms['p90']:.3f}]  ratio {row['ratio_median']:.2f}  "
                f"norm {row['norm_ms_per_million']['median']:.3f} ms/M  "
                f"{row['store_bytes_per_s'] / 1e9:.1f} GB/s = {row['bandwidth_share']:.0%} of the bound"
            )
    environment = {"machine": platform.machine(), "torch": torch.__version__, "num_parameters": num_parameters}
    print(json.dumps({"benchmark": "optimizer", "environment": environment, "rows": rows}))


if __name__ == "__main__":
    main()
