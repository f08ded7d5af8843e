"""Plain fine-tuning with transformers and torch.optim.AdamW: what every fast path is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from isthmus.tuning.data import MicroBatch, keep_documents_apart


@dataclass
class Reference:
    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    is_encoder_decoder = AutoConfig.from_pretrained(path).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=dtype)
    if model.config.model_type == "nllb-moe":
        for module in model.modules():
            if type(module).__name__ == "NllbMoeExperts":
                module.forward = _weighted_sum.__get__(module)
    else:
        model.set_experts_implementation("eager")
    keep_documents_apart(model)
    return model.train()


def _weighted_sum(self: torch.nn.ModuleDict, hidden: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """What NLLB-MoE means: the sum over experts of probability times expert. (transformers 5.23 runs two experts
    only.)"""
    outputs = [self[f"expert_{number}"](hidden) for number in range(router_probs.shape[1])]
    return (router_probs[:, :, None] * torch.stack(outputs, dim=1)).sum(dim=1)


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}


def train(
    path: Path,
    steps: list[list[MicroBatch]],
    *,
    learning_rate: float,
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    dtype: torch.dtype = torch.float32,
) -> Reference:
    """Losses are means over label tokens, as a step over all micro-batches at once would give."""
    model = load(path, dtype)
    before = state(model)
    # As in our runs, low-precision weights are rounded from FP32 masters, which are what AdamW updates.
    masters = {
        parameter: parameter if parameter.dtype == torch.float32 else torch.nn.Parameter(parameter.detach().float())
        for parameter in model.parameters()
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=learning_rate, weight_decay=weight_decay, eps=epsilon)
    coefficients = (getattr(model.config, name, 0.0) or 0.0 for name in ("router_aux_loss_coef", "router_z_loss_coef"))
    arguments = {"use_cache": False}
    if any(value > 0 for value in coefficients):
        arguments["output_router_logits"] = True
    losses = []
    for batches in steps:
        total = sum(batch.num_label_tokens for batch in batches)
        optimizer.zero_grad(set_to_none=False)
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        step_loss = 0.0
        for batch in batches:
            loss = model(**batch.inputs, **arguments).loss * (batch.num_label_tokens / total)
            loss.backward()
            step_loss += float(loss.detach())
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for parameter, master in masters.items():
            assert parameter.grad is not None
            master.grad = parameter.grad.to(master.dtype)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)
        losses.append(step_loss)
    return Reference(losses, before, state(model))


def random_steps(
    num_steps: int,
    num_micro_batches: int,
    *,
    vocab_size: int,
    seq_len: int = 24,
    size: int = 2,
    seed: int = 0,
    is_encoder_decoder: bool = False,
) -> list[list[MicroBatch]]:
    """Micro-batches of random tokens with different numbers of label tokens."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(num_steps):
        batches = []
        for number in range(num_micro_batches):
            ids = torch.randint(3, vocab_size, (size, seq_len), generator=generator)
            labels = ids.clone()
            labels[:, : 2 + 3 * number] = -100
            inputs = {"input_ids": ids, "labels": labels}
            if is_encoder_decoder:
                inputs["attention_mask"] = torch.ones_like(ids)
            counted = labels if is_encoder_decoder else labels[:, 1:]
            batches.append(
                MicroBatch(inputs=inputs, num_tokens=ids.numel(), num_label_tokens=int((counted != -100).sum()))
            )
        steps.append(batches)
    return steps
