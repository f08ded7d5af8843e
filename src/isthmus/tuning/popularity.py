"""``isthmus trace``: runs a model over data, forward only, and records how many tokens chose each expert, step by step.

Only weights are in memory, in the dtype that is computed in; there are no gradients, masters or moments.

Legend: ``T`` tokens of a micro-batch, ``k`` choices per token, ``H`` hidden size, ``E`` experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console, RenderableType
from torch import Tensor, nn

from isthmus.models.attention import use_blocked_attention
from isthmus.models.checkpoint_files import checkpoint_files, resolve_checkpoint
from isthmus.models.config import load_config
from isthmus.models.expert_math import ExpertMath
from isthmus.models.moe_model import MoeModel, unit_views
from isthmus.models.reader import read_checkpoint
from isthmus.models.routing import combine, count_by_expert, gather, sort_by_expert, weights_of
from isthmus.models.safetensors_file import SafetensorsReader
from isthmus.models.skeleton import torch_dtype
from isthmus.planning.popularity_trace import PopularityTrace, write_trace
from isthmus.reporting.progress import TrainingProgress
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import UnitKey
from isthmus.training.heap import keep_freed_memory
from isthmus.training.output import check_file
from isthmus.tuning.data import BatchStream, MicroBatch, keep_documents_apart, load_dataset_for

NUM_RANGES = 4
"""Of layers, whose skewness is told apart."""


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What ``isthmus trace`` was asked for. Names and meanings are those of ``isthmus tune``."""

    model: str | Path
    data: str | Path
    output: str | Path
    columns: str | None = None
    seq_len: int = 512
    micro_batch_size: int = 1
    micro_batches: int = 4
    steps: int = 16
    dtype: str = "bf16"
    num_layers: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ``ValueError`` or ``OSError`` for what can be seen to be wrong without model and data."""
        for name in ("seq_len", "micro_batch_size", "micro_batches", "steps"):
            if getattr(self, name) < 1:
                raise IsthmusError(f"{name}: got {getattr(self, name)}, wanted at least 1.")
        torch_dtype(self.dtype)
        check_file("output", Path(self.output))


def trace(
    model: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    columns: str | None = None,
    seq_len: int = 512,
    micro_batch_size: int = 1,
    micro_batches: int = 4,
    steps: int = 16,
    dtype: str = "bf16",
    num_layers: int | None = None,
    seed: int = 0,
    plain: bool | None = None,
) -> PopularityTrace:
    """Records which experts the model's routers choose on ``data`` and writes it to ``output``, for ``isthmus simulate
    tune`` and ``isthmus plan tune``; says on stdout how skewed it is.

    Parameters are those of ``isthmus trace``. Needs memory for the weights, in ``dtype``. Blocks until done. Raises
    ``ValueError`` or ``OSError`` for input that cannot work, naming the field and the fix.
    """
    options = TraceOptions(**{name: value for name, value in locals().items() if name != "plain"})
    options.check()
    with TrainingProgress(steps, title="isthmus trace", plain=plain) as progress:
        path = resolve_checkpoint(model)
        config = load_config(path, num_layers=num_layers)
        for file in checkpoint_files(path):
            SafetensorsReader(file).close()
        stream = _read_data(options, path, progress)
        counting = CountingModel(MoeModel.build(config, dtype), path, progress)
        recorded: list[dict[int, list[int]]] = []
        for step in range(1, steps + 1):
            started_s = time.perf_counter()
            batches = stream.next_step()
            counts_LE, loss = counting.step(batches)
            recorded.append(counts_LE)
            num_tokens = sum(batch.num_tokens for batch in batches)
            rate = num_tokens / (time.perf_counter() - started_s)
            progress.step(TraceView(step=step, loss=loss, tokens_per_s=rate, skewness=_skewness(counts_LE)))
    found = PopularityTrace.of_steps(counting.model.spec, recorded)
    write_trace(found, Path(output))
    show(found, options, counting.model.spec.moe_layers, Console())
    return found


class CountingModel:
    """A model with its weights in host memory that computes its loss and counts whom its routers choose."""

    def __init__(self, model: MoeModel, path: Path, progress: TrainingProgress) -> None:
        """Reads the checkpoint at ``path``. Blocks."""
        keep_freed_memory()
        self.model = model
        model.module.eval()
        keep_documents_apart(model.module)
        use_blocked_attention(model.module)
        flats = {
            key: torch.empty(layout.numel, dtype=torch_dtype(layout.dtype)) for key, layout in model.layouts.items()
        }
        views = {key: unit_views(layout, flats[key]) for key, layout in model.layouts.items()}
        read_checkpoint(path, model, views.__getitem__, progress=lambda done: progress.phase("reading weights", done))
        for key, flat in flats.items():
            if not key.is_expert:
                model.bind(key, flat)
        self._weights = {key: tensors for key, tensors in views.items() if key.is_expert}
        self._math = {layer: ExpertMath(parts.spec, model.experts[layer]) for layer, parts in model.moe_parts.items()}
        self._counts: defaultdict[int, list[int]] = defaultdict(list)
        model.set_experts_function(self._experts)

    @torch.no_grad()
    def step(self, batches: list[MicroBatch]) -> tuple[dict[int, list[int]], float]:
        """(tokens of every layer's experts, mean loss over label tokens) of all micro-batches together."""
        self._counts.clear()
        total = sum(batch.num_label_tokens for batch in batches)
        arguments = self.model.forward_arguments()
        loss = 0.0
        for batch in batches:
            loss += float(self.model.module(**batch.inputs, **arguments).loss) * batch.num_label_tokens / total
        return dict(self._counts), loss

    def _experts(
        self, layer: int, module: nn.Module, hidden_TH: Tensor, index_Tk: Tensor, weights_Tk: Tensor
    ) -> Tensor:
        num_experts = self.model.moe_parts[layer].spec.num_experts
        counts_E = count_by_expert(index_Tk, num_experts)
        before = self._counts[layer] or [0] * num_experts
        self._counts[layer] = [a + b for a, b in zip(before, counts_E, strict=True)]
        routing = sort_by_expert(index_Tk, num_experts, counts_E)
        chosen = [expert for expert, count in enumerate(counts_E) if count]
        outputs_SH, _ = self._math[layer].forward_many(
            [self._weights[UnitKey(layer, expert)] for expert in chosen],
            [counts_E[expert] for expert in chosen],
            gather(hidden_TH, routing),
            weights_of(weights_Tk, routing),
            save=False,
        )
        return combine(outputs_SH, routing, *weights_Tk.shape)


@dataclass(frozen=True, kw_only=True)
class TraceView:
    """What a step shows."""

    step: int
    loss: float
    tokens_per_s: float
    skewness: float

    def parts(self) -> list[str]:
        return [f"loss {self.loss:.4f}", f"G {self.skewness:.3f}", f"{self.tokens_per_s:,.0f} tokens/s"]

    def rows(self, evaluated: str) -> list[tuple[RenderableType, ...]]:
        return [("loss", f"{self.loss:.4f}", "tokens/s", f"{self.tokens_per_s:,.0f}"), ("G", f"{self.skewness:.3f}")]


def _skewness(counts_LE: dict[int, list[int]]) -> float:
    shares = [np.array(counts) / max(1, sum(counts)) for counts in counts_LE.values()]
    return float(np.mean([np.square(share).sum() for share in shares]))


def _read_data(options: TraceOptions, path: Path, progress: TrainingProgress) -> BatchStream:
    """The steps to run over. Raises ``IsthmusError`` for data that is not there, is too little, or has tokens that the
    model does not know."""
    dataset = load_dataset_for(
        path,
        load_config(path),
        options.data,
        seq_len=options.seq_len,
        columns=options.columns,
        progress=partial(progress.phase, "reading data"),
    )
    stream = BatchStream(
        dataset,
        micro_batch_size=options.micro_batch_size,
        num_micro_batches=options.micro_batches,
        seed=options.seed,
    )
    per_step = options.micro_batches * options.micro_batch_size
    if stream.num_sequences < options.steps * per_step:
        raise IsthmusError(
            f"data: {options.data} makes {stream.num_sequences} sequences of {options.seq_len} tokens, wanted "
            f"{options.steps * per_step}, {per_step} for each of {options.steps} steps, since what comes twice tells "
            f"nothing new; give more text or lower --steps{_most_steps(stream.num_sequences // per_step)}, --seq-len, "
            "--micro-batches or --micro-batch-size."
        )
    return stream


def _most_steps(number: int) -> str:
    return f" (to {number})" if number else ""


def show(found: PopularityTrace, options: TraceOptions, moe_layers: tuple[int, ...], console: Console) -> None:
    """Prints how skewed the popularity is, by ranges of layers, how much it changes, and what the file is for."""
    skew_L = found.skewness_L
    num_steps, num_layers = found.counts.shape[:2]
    width = math.ceil(num_layers / NUM_RANGES)
    uniform = float(np.mean([1 / number for number in found.num_experts]))
    lines = [f"{options.output}: {num_steps} steps, {num_layers} MoE layers, {int(found.counts.sum()):,} choices"]
    if num_layers > 1:
        for first in range(0, num_layers, width):
            last = min(first + width, num_layers) - 1
            lines.append(
                f"  layers {moe_layers[first]} to {moe_layers[last]}: G = {skew_L[first : last + 1].mean():.3f}"
            )
    lines.append(
        f"  all: G = {skew_L.mean():.3f} (the mean of Σ p²; {uniform:.3f} if all experts were equally popular)"
    )
    if num_steps > 1:
        lines.append(
            f"  drift: {found.drift:.1%} of the choices go to other experts from one step to the next (chance alone: "
            f"{found.drift_by_chance:.1%})"
        )
    lines += [
        f"isthmus simulate tune --model {options.model} --cluster CLUSTER --popularity {options.output}",
        f"isthmus plan tune {options.model} --cluster CLUSTER --popularity {options.output}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
