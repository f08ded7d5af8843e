"""What the GPU benchmark will do: the model's size after the host's memory, budgets, steps; and how to say it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen3MoeConfig

from isthmus.models.moe_model import MoeModel
from isthmus.planning.memory import dense_bytes, host_bytes
from isthmus.planning.problem import BYTES_PER_VALUE
from isthmus.reporting.environment import memory_bytes
from isthmus.spec.units import parse_bytes
from isthmus.tuning.bench import BenchOptions

SPARE_HOST_BYTES = 8 << 30
"""For the system, the libraries and token buffers."""
STAGES = {"conformance": 0.08, "exactness": 0.12, "model": 0.2, "fsdp": 0.3, "policies": 1.0}
"""Name -> most of the minutes left that the stage may take, in the order they run."""
PINNED_ROUNDING = 4 / 3
"""Pinned tensors are rounded up to powers of two: this much for the expert tensors of the full-size layers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides what is measured. Plain JSON values."""

    scratch: str
    minutes: float
    is_rehearsal: bool
    num_layers: int
    num_parameters: int
    accelerator_memory_bytes: int
    seq_len: int
    num_micro_batches: int
    num_steps: int
    policies: list[str]
    skews: list[float | None]
    is_fsdp_pinned: bool
    needed_host_bytes: int
    fsdp_host_bytes: int
    available_host_bytes: int
    checkpoint_bytes: int
    share_of_experts_that_fit: float

    @property
    def directory(self) -> Path:
        return Path(self.scratch)

    @property
    def model_path(self) -> Path:
        return self.directory / f"model-{self.num_layers}-layers{'-toy' if self.is_rehearsal else ''}"

    @property
    def accelerator(self) -> str:
        return "emulated" if self.is_rehearsal else "cuda"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_rehearsal else "cuda")

    def bench_options(self) -> BenchOptions:
        """The part that ``isthmus bench tune`` knows."""
        return BenchOptions(
            model=self.model_path,
            policies=tuple(self.policies),
            skews=tuple(self.skews),
            cpu_speeds=(1.0,),
            seq_len=self.seq_len,
            num_micro_batches=self.num_micro_batches,
            num_steps=self.num_steps,
        )


def configuration(num_layers: int, *, is_toy: bool, vocab_size: int = 8192) -> Qwen3MoeConfig:
    """Layers of Qwen3-30B-A3B: 128 experts of 4.7 million parameters, eight per token. The vocabulary is our own."""
    shape: dict[str, Any] = dict(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    )
    if is_toy:
        shape = dict(
            hidden_size=64,
            moe_intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=2,
        )
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        intermediate_size=shape["moe_intermediate_size"],
        num_hidden_layers=num_layers,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        # Both sides then compute the same loss, whether a step is one batch or several.
        router_aux_loss_coef=0.0,
        **shape,
    )


def fsdp_bytes(num_parameters: int, *, is_pinned: bool) -> int:
    """FP32 weights and gradients (pinned or not) and two FP32 moments."""
    return round(num_parameters * (8 * (PINNED_ROUNDING if is_pinned else 1.0) + 8))


def make_plan(arguments: argparse.Namespace) -> Plan:
    """The plan for this host. Raises ``SystemExit`` where not even two layers fit and this is not a dry run."""
    is_toy = arguments.rehearse
    available = arguments.host_memory or min(memory_bytes(), psutil.virtual_memory().available)
    spare = 1 << 30 if is_toy else SPARE_HOST_BYTES

    def built(num_layers: int) -> MoeModel:
        return MoeModel.build(configuration(num_layers, is_toy=is_toy), "bf16")

    def needed(model: MoeModel) -> int:
        return round(1.10 * sum(host_bytes(model.layouts.values()).values())) + spare

    num_layers = arguments.layers or 2
    model, wanted = built(num_layers), 2e5 if is_toy else arguments.parameters
    while not arguments.layers and model.spec.num_parameters < wanted:
        larger = built(num_layers + 1)
        if needed(larger) > available:
            break
        model, num_layers = larger, num_layers + 1
    spec = model.spec
    if needed(model) > available and not arguments.dry_run:
        raise SystemExit(
            f"host memory: {num_layers} layers need {_gib(needed(model))}, {_gib(available)} are free; "
            "take fewer layers, or a larger host"
        )
    is_pinned = not is_toy and fsdp_bytes(spec.num_parameters, is_pinned=True) + spare <= available
    budget = parse_bytes(arguments.accelerator_memory, "accelerator_memory")
    num_experts = sum(layer.num_experts for layer in spec.layers if layer is not None)
    slot_bytes = model.slot_numel * BYTES_PER_VALUE["bf16"]
    num_slots = max(0, budget - dense_bytes(model.layouts, num_layers)) // slot_bytes
    return Plan(
        scratch=str(arguments.scratch.resolve()),
        minutes=arguments.minutes,
        is_rehearsal=is_toy,
        num_layers=num_layers,
        num_parameters=spec.num_parameters,
        accelerator_memory_bytes=budget,
        seq_len=32 if is_toy else arguments.seq_len,
        num_micro_batches=2 if is_toy else arguments.micro_batches,
        num_steps=1 if is_toy else arguments.steps,
        policies=arguments.policies.split(","),
        skews=[None if part == "uniform" else float(part) for part in arguments.skew.split(",")],
        is_fsdp_pinned=is_pinned,
        needed_host_bytes=needed(model),
        fsdp_host_bytes=fsdp_bytes(spec.num_parameters, is_pinned=is_pinned) + spare,
        available_host_bytes=available,
        checkpoint_bytes=2 * spec.num_parameters,
        share_of_experts_that_fit=min(1.0, num_slots / num_experts),
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def describe(plan: Plan) -> str:
    """The plan for people, and what to know before starting it."""
    skews = ", ".join("uniform" if skew is None else f"{skew:g}" for skew in plan.skews)
    pinned = "pinned" if plan.is_fsdp_pinned else "not pinned"
    lines = [
        f"model          {plan.num_layers} layers, {plan.num_parameters / 1e9:.3g}e9 parameters, bf16, FP32 masters",
        f"host memory    {_gib(plan.needed_host_bytes)} for isthmus: 16 bytes per parameter, 10 %, and some to spare",
        f"               {_gib(plan.fsdp_host_bytes)} for FSDP2 ({pinned})",
        f"               {_gib(plan.available_host_bytes)} available",
        f"disk           {_gib(plan.checkpoint_bytes)} in {plan.model_path}",
    ]
    if plan.is_rehearsal:
        lines.append("accelerator    emulated, with little more than the least memory that every policy accepts")
    else:
        lines.append(
            f"accelerator    cuda, held to {_gib(plan.accelerator_memory_bytes)}: room for "
            f"{plan.share_of_experts_that_fit:.0%} of the experts' weights, activations and gradients not counted"
        )
    lines += [
        f"step           {plan.num_micro_batches} micro-batches of {plan.seq_len} tokens",
        f"policies       {', '.join(plan.policies)}; skews {skews}",
        f"stages         {', '.join(STAGES)}; {plan.minutes:g} minutes in all",
    ]
    return "\n".join(lines + [f"NOTE           {note}" for note in _notes(plan)])


def _notes(plan: Plan) -> list[str]:
    if plan.is_rehearsal:
        return ["a rehearsal: every stage runs, its times mean nothing"]
    notes = []
    if plan.num_parameters < 10e9:
        notes.append("fewer than 10 billion parameters (host memory, --parameters or --layers allow no more)")
    if plan.share_of_experts_that_fit > 0.6:
        notes.append("most experts fit: lower --accelerator-memory for a comparison that says something")
    if plan.needed_host_bytes > plan.available_host_bytes:
        notes.append("this host has too little memory: a run would be refused")
    if not torch.cuda.is_available():
        notes.append("no CUDA device here: only --dry-run and --rehearse work")
    return notes
