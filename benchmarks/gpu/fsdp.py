"""The baseline: FSDP2 with CPU offload on the same checkpoint and batches, AdamW on the CPU, the same memory cap."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.gpu.plan import Plan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from isthmus.reporting.host_memory import PeakHostMemory
from isthmus.spec.report import Spread
from isthmus.tuning.bench import make_batches
from isthmus.tuning.data import MicroBatch, keep_documents_apart

NUM_WARM_STEPS = 2


def run_fsdp(plan: Plan, save: Callable[[dict[str, Any]], None]) -> None:
    """Times steps and saves what is known after each. Blocks for minutes.

    All sequences of a step make one batch: parameters then travel once per pass, which is the fewest FSDP can do.
    Masters are FP32 and computation is bf16, as in isthmus.
    """
    batches = make_batches(plan.bench_options(), plan.model_path)
    num_tokens = sum(batch.num_tokens for batch in batches[0])
    if plan.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.accelerator_memory_bytes / total))
    meeting = plan.directory / "rendezvous"
    meeting.unlink(missing_ok=True)
    # The gradient norm is reduced where the gradients are, on the CPU.
    backend = "cpu:gloo,cuda:nccl" if plan.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    seconds: list[float] = []
    with PeakHostMemory() as memory:
        model = sharded_model(plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        for number in range(NUM_WARM_STEPS + 2 * plan.num_steps):
            start_s = time.perf_counter()
            loss = train_step(model, optimizer, batches[number % len(batches)], plan.device)
            if number < NUM_WARM_STEPS:
                continue
            seconds.append(time.perf_counter() - start_s)
            rates = sorted(num_tokens / second for second in seconds)
            spread = Spread(
                median=statistics.median(rates), p10=rates[len(rates) // 10], p90=rates[-1 - len(rates) // 10]
            )
            save(
                {
                    "passed": math.isfinite(loss),
                    "tokens_per_s": asdict(spread),
                    "step_seconds": seconds,
                    "is_pinned": plan.is_fsdp_pinned,
                    "memory_cap_bytes": plan.accelerator_memory_bytes,
                    "peak_reserved_bytes": torch.cuda.max_memory_reserved() if plan.device.type == "cuda" else None,
                    "peak_host_bytes": memory.peak_bytes,
                }
            )
    dist.destroy_process_group()


def sharded_model(plan: Plan) -> Any:
    """The model layer by layer: each passes through the device on its way to (pinned) host memory."""
    model = AutoModelForCausalLM.from_pretrained(plan.model_path, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    keep_documents_apart(model)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(plan.device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    }
    if plan.device.type == "cuda":
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=plan.is_fsdp_pinned)
    for layer in model.model.layers:
        fully_shard(layer, **settings)
        gc.collect()
    fully_shard(model, **settings)
    return model.train()


def train_step(model: Any, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], device: torch.device) -> float:
    """One step; returns its loss. Blocks until the device is done."""
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]).to(device) for name in batches[0].inputs}
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return float(loss.detach())
