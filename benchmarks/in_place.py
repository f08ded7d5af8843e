"""Unconstrained fine-tuning on the CPU: ``--accelerator host`` against plain transformers, paired and interleaved.

    python benchmarks/in_place.py [--dtypes fp32,bf16] [--repeats 5]

Both train the same random Qwen3-MoE checkpoint on the same tokens with the same dtype; transformers with its
``grouped_mm`` experts and ``torch.optim.AdamW(fused=True)``. Each lives in a process of its own, as it would in use (in
one process they would evict one another's compiled GEMMs from oneDNN's cache), and only one computes at a time. Prints
the bound (GEMM floating-point operations at the rate a plain GEMM of an expert's size reaches in this very run), then
medians and spread, then the share of the bound; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from isthmus.models.tiny import write_random_checkpoint
from isthmus.reporting.environment import environment
from isthmus.reporting.recorder import Recorder
from isthmus.tuning.data import MicroBatch
from isthmus.tuning.session import Session, SessionOptions

NUM_LAYERS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 8, 512, 1024, 16, 2
SEQUENCES, SEQ_LEN, VOCABULARY = 4, 512, 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_WARM_STEPS = 4
"""Every batch once: memory is touched, GEMMs of the sizes that the routing makes are compiled."""


def config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )


class Transformers:
    """A step of plain transformers: forward, backward, clip, fused AdamW."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).train()
        self.model.set_experts_implementation("grouped_mm")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def gemm_flops_per_s(dtype: torch.dtype) -> float:
    """A plain GEMM with the sizes of one expert's share of a step."""
    rows = SEQUENCES * SEQ_LEN * TOP_K // EXPERTS
    a, b = torch.randn(rows, HIDDEN).to(dtype), torch.randn(2 * INTERMEDIATE, HIDDEN).to(dtype)
    seconds = []
    for _ in range(40):
        start_s = time.perf_counter()
        torch.nn.functional.linear(a, b)
        seconds.append(time.perf_counter() - start_s)
    return 2 * rows * HIDDEN * 2 * INTERMEDIATE / statistics.median(seconds)


def step_flops() -> float:
    """Multiply-adds of all matrices, forward and twice that backward; attention scores included."""
    tokens = SEQUENCES * SEQ_LEN
    attention = HIDDEN * 64 * (8 + 4 + 4 + 8) + 2 * SEQ_LEN * HIDDEN
    experts = TOP_K * 3 * HIDDEN * INTERMEDIATE
    return 3 * 2 * tokens * (NUM_LAYERS * (attention + experts) + HIDDEN * VOCABULARY)


TOKENS = SEQUENCES * SEQ_LEN


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (SEQUENCES, SEQ_LEN), generator=generator) for _ in range(4)]


def serve_transformers(path: Path, dtype_name: str, connection: Connection) -> None:
    """A step for every number that comes in; answers with its seconds. Ends at None."""
    plain, ids = Transformers(path, DTYPES[dtype_name]), batches()
    answer(connection, lambda number: plain.step(ids[number]))


def serve_isthmus(path: Path, dtype_name: str, connection: Connection) -> None:
    micro = [
        [MicroBatch(inputs={"input_ids": ids, "labels": ids}, num_tokens=TOKENS, num_label_tokens=TOKENS - SEQUENCES)]
        for ids in batches()
    ]
    options = SessionOptions(accelerator="host", dtype=dtype_name)
    with Session(path, options, micro[0], Recorder(enabled=False)) as session:

        def step(number: int) -> None:
            session.train_step(micro[number], step=session.num_steps + 1, learning_rate=1e-6)
            session.finish()

        answer(connection, step)


def answer(connection: Connection, step: Callable[[int], None]) -> None:
    while (number := connection.recv()) is not None:
        start_s = time.perf_counter()
        step(number)
        connection.send(time.perf_counter() - start_s)


def compare(path: Path, dtype_name: str, repeats: int) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"transformers": [], "isthmus": []}
    rates, connections, processes = [], {}, []
    for name, serve in (("transformers", serve_transformers), ("isthmus", serve_isthmus)):
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(path, dtype_name, theirs), daemon=True))
        processes[-1].start()
    for number in range(NUM_WARM_STEPS + repeats):
        for name, connection in connections.items():
            connection.send(number % 4)
            elapsed_s = connection.recv()
            if number >= NUM_WARM_STEPS:
                seconds[name].append(elapsed_s)
        rates.append(gemm_flops_per_s(DTYPES[dtype_name]))
    for connection in connections.values():
        connection.send(None)
    for process in processes:
        process.join(timeout=60)
    bound_s = step_flops() / statistics.median(rates)
    print(f"\n{dtype_name}: bound {bound_s:.2f} s a step ({statistics.median(rates) / 1e9:.0f} GFLOP/s plain GEMM)")
    result: dict[str, object] = {"dtype": dtype_name, "bound_s": bound_s, "gemm_flops_per_s": statistics.median(rates)}
    for name, values in seconds.items():
        median_s = statistics.median(values)
        print(
            f"{name:13s} median {median_s:.2f} s (min {min(values):.2f}, max {max(values):.2f})  "
            f"{TOKENS / median_s:7.0f} tokens/s  {bound_s / median_s:.2f} of the bound"
        )
        result[f"{name}_tokens_per_s"] = TOKENS / median_s
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["isthmus"], strict=True)]
    result["ratio"] = statistics.median(ratios)
    print(f"isthmus ÷ transformers {statistics.median(ratios):.2f} (paired; {min(ratios):.2f} … {max(ratios):.2f})")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_random_checkpoint(config(), Path(scratch) / "model", 0)
        results = [compare(Path(scratch) / "model", dtype, arguments.repeats) for dtype in arguments.dtypes.split(",")]
    print(json.dumps({"benchmark": "in_place", "results": results, "environment": environment()}))


if __name__ == "__main__":
    main()
