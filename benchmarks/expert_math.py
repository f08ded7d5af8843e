"""How fast routed experts are, forward and backward, beside plain GEMMs of the same sizes and transformers' grouped_mm.

    python benchmarks/expert_math.py [--threads 1,2] [--dtypes fp32,bf16] [--tokens 256] [--seconds 20]

Everything that is compared runs in turns, so that a noisy neighbour hits all alike. On one thread the clock is that
thread's CPU time, which neighbours do not slow down (but for caches and memory); on more it is the wall clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from isthmus.models.expert_math import ExpertMath
from isthmus.models.routing import combine, gather, sort_by_expert
from isthmus.spec.model import ExpertSpec, TensorSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Task = Callable[[], tuple[Any, ...]]


@dataclass
class Problem:
    """Balanced routing of ``tokens`` rows to each expert, two experts per token."""

    spec: ExpertSpec
    dtype: torch.dtype
    tokens: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        spec, dtype = self.spec, self.dtype
        self.math = ExpertMath(spec)
        flats = [torch.randn(spec.numel).mul_(0.02).to(dtype) for _ in range(spec.num_experts)]
        self.weights = [self.math.views(flat) for flat in flats]
        self.gradients = [self.math.views(torch.zeros_like(flat)) for flat in flats]
        pairs = self.tokens * spec.num_experts
        self.index = (torch.arange(pairs) % spec.num_experts).view(-1, spec.top_k)
        self.index = self.index[torch.randperm(len(self.index))]
        self.s = torch.rand(self.index.shape).to(dtype)
        self.x = torch.randn(len(self.index), spec.hidden_size).to(dtype)
        self.g = torch.randn(len(self.index), spec.hidden_size).to(dtype)

    @property
    def gemm_flops(self) -> int:
        """One of the three products of a gated expert's forward (gate, up, down), over all experts."""
        return self.spec.forward_flops_per_token // 3 * self.tokens * self.spec.num_experts


def ours(problem: Problem, *, save: bool, accumulate: bool) -> Task:
    """Routing, gathering, forward and backward of all experts, and combining: from the router's choices to d hidden."""
    experts, num_experts = problem.math, problem.spec.num_experts
    adds = [accumulate] * num_experts

    def run() -> tuple[Tensor, ...]:
        routing = sort_by_expert(problem.index, num_experts)
        x_SH, s_S = gather(problem.x, routing), problem.s.reshape(-1)[routing.order_S]
        out_SH, saved = experts.forward_many(problem.weights, routing.counts_E, x_SH, s_S, save=save)
        out_TH = combine(out_SH, routing, *problem.index.shape)
        g_SH = gather(problem.g, routing)
        dx_SH, ds_S = experts.backward_many(
            problem.weights, routing.counts_E, x_SH, s_S, g_SH, saved, problem.gradients, accumulate=adds
        )
        ds = torch.empty_like(problem.s)
        ds.view(-1)[routing.order_S] = ds_S
        return out_TH, combine(dx_SH, routing, *problem.index.shape), ds

    return run


def transformers_grouped_mm(problem: Problem, *, accumulate: bool) -> Task:
    """The same by autograd. Without ``accumulate`` the weights' gradients start from None."""
    spec = problem.spec
    config = MixtralConfig(
        hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size, num_local_experts=spec.num_experts
    )
    config._experts_implementation = "grouped_mm"
    module = MixtralExperts(config).to(problem.dtype)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(torch.stack([weight[name] for weight in problem.weights]))

    def run() -> tuple[Any, ...]:
        if not accumulate:
            module.zero_grad(set_to_none=True)
        x, s = (tensor.detach().requires_grad_() for tensor in (problem.x, problem.s))
        out = module(x, problem.index, s)
        out.backward(problem.g)
        return out.detach(), x.grad, s.grad

    return run


def products(problem: Problem) -> dict[str, Task]:
    """The GEMMs alone, each over all experts' weights, into buffers that exist."""
    spec = problem.spec
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    x_NH, y_NH, act_NI, u_NI, pre_NP = (
        torch.randn(problem.tokens, width).to(problem.dtype)
        for width in (hidden, hidden, intermediate, intermediate, 2 * intermediate)
    )
    up, down = ([weight[name] for weight in problem.weights] for name in ("gate_up_proj", "down_proj"))
    dup, ddown = ([gradient[name] for gradient in problem.gradients] for name in ("gate_up_proj", "down_proj"))

    def each(product: Callable[[int], object]) -> Task:
        return lambda: tuple(product(expert) for expert in range(spec.num_experts))

    return {
        "pre = x W_up^T": each(lambda e: torch.mm(x_NH, up[e].t(), out=pre_NP)),
        "y = act W_down^T": each(lambda e: torch.mm(act_NI, down[e].t(), out=y_NH)),
        "u = g W_down": each(lambda e: torch.mm(x_NH, down[e], out=u_NI)),
        "dW_down = g^T act": each(lambda e: torch.mm(y_NH.t(), act_NI, out=ddown[e])),
        "dW_up = dpre^T x": each(lambda e: torch.mm(pre_NP.t(), x_NH, out=dup[e])),
        "dx = dpre W_up": each(lambda e: torch.mm(pre_NP, up[e], out=y_NH)),
    }


def check(problem: Problem) -> None:
    """Both sides compute the same thing, or no comparison means anything."""
    theirs = transformers_grouped_mm(problem, accumulate=False)()
    for got, wanted in zip(ours(problem, save=True, accumulate=False)(), theirs, strict=True):
        error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
        if error > (1e-5 if problem.dtype == torch.float32 else 1e-2):
            raise RuntimeError(f"expert math and grouped_mm differ by {error:.1e}")


def in_turns(tasks: dict[str, Task], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(times[next(iter(times))]) < 3:
        for name, task in tasks.items():
            start_s = clock()
            task()
            times[name].append(clock() - start_s)
    return times


def measure(problem: Problem, num_threads: int, seconds: float) -> dict[str, object]:
    """Prints and returns the row of one combination."""
    torch.set_num_threads(num_threads)
    check(problem)
    gemms = products(problem)
    times = in_turns(
        {
            **gemms,
            "save": ours(problem, save=True, accumulate=False),
            "save, add": ours(problem, save=True, accumulate=True),
            "recompute": ours(problem, save=False, accumulate=False),
            "recompute, add": ours(problem, save=False, accumulate=True),
            "grouped_mm": transformers_grouped_mm(problem, accumulate=False),
            "grouped_mm, add": transformers_grouped_mm(problem, accumulate=True),
        },
        seconds,
        time.thread_time if num_threads == 1 else time.perf_counter,
    )
    once = [math.fsum(turn) for turn in zip(*(times[name] for name in gemms), strict=True)]
    again = times["pre = x W_up^T"]
    print(f"\n{num_threads} threads, {problem.dtype}, {problem.spec.num_experts} experts, {problem.tokens} rows each")
    for name in gemms:
        flops = problem.gemm_flops * (2 if "up" in name else 1)
        print(f"  {name:20s} {flops / statistics.median(times[name]) / 1e9:7.1f} GFLOP/s")
    rate = 9 * problem.gemm_flops / statistics.median(once) / 1e9
    print(f"  {'the bound: all six':20s} {rate:7.1f} GFLOP/s, {statistics.median(once) * 1e3:.2f} ms")
    row: dict[str, object] = {
        "num_threads": num_threads,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "tokens_per_expert": problem.tokens,
        "gemm_s": statistics.median(once),
    }
    for name in [name for name in times if name not in gemms]:
        kind, _, adds = name.partition(", ")
        bound = [a + b for a, b in zip(once, again, strict=True)] if kind == "recompute" else once
        theirs = times["grouped_mm, add" if adds else "grouped_mm"]
        share = median_ratio(bound, times[name])
        gain = median_ratio(theirs, times[name])
        median, *spread = (statistics.quantiles(times[name], n=10)[decile] * 1e3 for decile in (4, 0, 8))
        print(
            f"  {name:20s} {median:7.2f} ms ({spread[0]:.2f} … {spread[1]:.2f}), "
            f"{share:.2f} of the GEMMs' rate, {gain:.2f} x grouped_mm"
        )
        key = name.replace(", ", "_")
        row |= {f"{key}_s": median / 1e3, f"{key}_share_of_gemm": share, f"{key}_gain_over_grouped_mm": gain}
    return row


def median_ratio(left: list[float], right: list[float]) -> float:
    """Of pairs that ran in the same turn."""
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--tokens", default="256", help="rows per expert; several, separated by commas")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each combination")
    return parser.parse_args()


def combinations(arguments: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    tokens, threads = ([int(item) for item in text.split(",")] for text in (arguments.tokens, arguments.threads))
    return itertools.product(threads, arguments.dtypes.split(","), tokens)


def main() -> None:
    arguments = parse()
    hidden, intermediate = arguments.hidden, arguments.intermediate
    spec = ExpertSpec(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=arguments.experts,
        top_k=2,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        activation="silu_glu",
        tensors=(
            TensorSpec(name="gate_up_proj", shape=(2 * intermediate, hidden)),
            TensorSpec(name="down_proj", shape=(hidden, intermediate)),
        ),
    )
    rows = [
        measure(Problem(spec, DTYPES[dtype], tokens), num_threads, arguments.seconds)
        for num_threads, dtype, tokens in combinations(arguments)
    ]
    print(json.dumps({"kind": "expert-math", "hidden_size": hidden, "intermediate_size": intermediate, "rows": rows}))


if __name__ == "__main__":
    main()
