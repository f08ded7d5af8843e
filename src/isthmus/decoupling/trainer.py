"""The loop of a run that trains a whole model in memory: steps, evaluations, checkpoints, signals, several processes.

Distillation and pre-training differ in the loss, which is given. With several processes (torchrun) each takes its part
of the batches, gradients are averaged, and rank 0 evaluates, saves and speaks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from isthmus.decoupling.optimizers import optimizers_of
from isthmus.reporting.progress import TrainingProgress, TrainingView
from isthmus.spec.errors import IsthmusError
from isthmus.training.batches import Batch, BatchStream
from isthmus.training.checkpoints import (
    checkpoint_directory,
    find_resumable,
    load_state,
    prune_checkpoints,
    save_state,
)
from isthmus.training.interruption import Interrupted, StopSignals
from isthmus.training.schedule import learning_rate_at

MEASURED_STEPS = 10
"""So many steps tell how many fit into the minutes that were asked for."""
_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of a parameter."""
LEAST_GAIN = 0.001
"""Share by which an evaluation must better the best one so far to count as better."""


class Evaluated(Protocol):
    """What an evaluation says."""

    @property
    def loss(self) -> float:
        """Less is better."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long and how fast. Either ``num_steps`` or ``minutes``; with minutes the steps are counted out after the
    first ten, and stay as they are when the run is resumed."""

    num_steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.02
    matrix_factor: float = 2.0
    """Muon's learning rate for the layers' matrices, by that of AdamW for all else. 0: AdamW for all."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    num_evaluations: int = 12
    save_every_s: float = 300.0
    patience: int | None = None
    """Stop after so many evaluations in a row that were no better. None: never."""

    def check(self) -> None:
        """Raises ``IsthmusError`` for what cannot work."""
        if (self.num_steps is None) == (self.minutes is None):
            raise IsthmusError("steps: give either --steps or --minutes")
        for name, value in (("steps", self.num_steps), ("minutes", self.minutes)):
            if value is not None and not value > 0:
                raise IsthmusError(f"{name}: got {value:g}, wanted more than 0")
        if not self.learning_rate > 0:
            raise IsthmusError(f"learning_rate: got {self.learning_rate:g}, wanted more than 0")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """One evaluation, and the steps up to it."""

    step: int
    elapsed_s: float
    """Of training, evaluations and saving left out; of all sessions of a run that was resumed."""
    num_tokens: int
    training_loss: float
    """Mean since the evaluation before."""
    evaluation: dict[str, float | None]


class Trainer:
    """Owns one run in ``output`` from its first step (or the one after the last checkpoint) to its last."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss: Callable[[Batch], Tensor],
        stream: BatchStream,
        evaluate: Callable[[], Evaluated],
        *,
        options: TrainingOptions,
        output: Path,
        progress: TrainingProgress,
        stop: StopSignals,
        beside: nn.Module | None = None,
    ) -> None:
        """``beside``: what the loss needs and is trained too, but is no part of the model."""
        options.check()
        self.model, self._loss, self._stream, self._evaluate = model, loss, stream, evaluate
        self.options, self.output, self.progress, self.stop = options, output, progress, stop
        self.records: list[TrainingRecord] = []
        self.num_steps = options.num_steps
        self.step = 0
        self._elapsed_s, self._num_tokens, self._saved_step = 0.0, 0, -1
        self._losses: list[float] = []
        self._named = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        others = [] if beside is None else list(beside.named_parameters())
        self._named |= {f"beside.{name}": tensor for name, tensor in others}
        self._device = next(iter(self._named.values())).device
        self._optimizers = optimizers_of(
            model,
            matrix_factor=options.matrix_factor,
            weight_decay=options.weight_decay,
            beside=[tensor for _, tensor in others],
        )
        self._is_shared = dist.is_initialized() and dist.get_world_size() > 1
        self.is_leader = not self._is_shared or dist.get_rank() == 0

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the end, or until evaluations get no better. Raises ``Interrupted``, and ``IsthmusError`` where the
        loss is not finite; the last checkpoint is whole in any case."""
        saved_s = time.monotonic()
        if self.num_steps is not None:
            self.progress.num_steps = self.num_steps
        if self.step == 0:
            self._record()
        with self.stop.deferred():
            while self.num_steps is None or self.step < self.num_steps:
                self._take_step()
                if self.num_steps is None and self.step == MEASURED_STEPS:
                    self._count_steps()
                is_last = self.step == self.num_steps
                every = max(1, (self.num_steps or 1) // self.options.num_evaluations)
                is_evaluated = self.num_steps is not None and (is_last or self.step % every == 0)
                if is_evaluated:
                    self._record()
                is_stopped = self._agree(self.stop.requested is not None)
                if is_last or is_stopped or self._agree(time.monotonic() - saved_s > self.options.save_every_s):
                    self.save()
                    saved_s = time.monotonic()
                if is_stopped:
                    number = self.stop.requested
                    assert number is not None
                    message = (
                        f"stopped by {number.name} after step {self.step}; its state is saved. Continue with --resume."
                    )
                    raise Interrupted(message, number)
                if is_evaluated and not is_last and self._is_stuck():
                    self.progress.message(
                        f"stopping at step {self.step}: {self.options.patience} evaluations no better"
                    )
                    self.save()
                    return

    def _take_step(self) -> None:
        begun_s = time.monotonic()
        options = self.options
        if self.num_steps is None:  # not known yet: rising
            rate = options.learning_rate * (self.step + 1) / (2 * MEASURED_STEPS)
        else:
            warmup = max(min(2 * MEASURED_STEPS, self.num_steps // 4), round(options.warmup * self.num_steps))
            rate = learning_rate_at(
                self.step + 1,
                schedule="linear",
                learning_rate=options.learning_rate,
                num_steps=self.num_steps + 1,
                warmup=warmup,
            )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]
        batch = {name: tensor.to(self._device) for name, tensor in self._stream.next().items()}
        loss = self._loss(batch)
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self._named.values(), options.clip_norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise IsthmusError(
                f"step {self.step}: the loss is {value}; the last checkpoint is kept. Try a lower --learning-rate."
            )
        self._losses.append(value)
        num_tokens = int(batch["attention_mask"].sum())
        self._num_tokens += num_tokens
        took_s = time.monotonic() - begun_s
        self._elapsed_s += took_s
        view = TrainingView(step=self.step, loss=value, learning_rate=rate, tokens_per_s=num_tokens / took_s)
        self.progress.step(view)

    def _count_steps(self) -> None:
        """From minutes to steps, the first half of the measured ones left out: they warm up."""
        assert self.options.minutes is not None
        count = torch.tensor(self.options.minutes * 60 / (self._elapsed_s / self.step), dtype=torch.float64)
        if self._is_shared:
            dist.broadcast(count, 0)
        self.num_steps = max(MEASURED_STEPS + 1, int(count))
        self.progress.num_steps = self.num_steps

    def _record(self) -> None:
        if self.is_leader:
            self.progress.phase("evaluating on text held out")
            evaluated = self._evaluate()
            mean = sum(self._losses) / len(self._losses) if self._losses else float("nan")
            self.records.append(
                TrainingRecord(
                    step=self.step,
                    elapsed_s=self._elapsed_s,
                    num_tokens=self._num_tokens,
                    training_loss=mean,
                    evaluation=asdict(evaluated),  # type: ignore[call-overload]
                )
            )
            self._losses.clear()
            self.progress.evaluation(self.step, evaluated.describe())
        if self._is_shared:
            dist.barrier()

    def _is_stuck(self) -> bool:
        patience = self.options.patience
        losses = [record.evaluation["loss"] or 0.0 for record in self.records]
        is_stuck = False
        if self.is_leader and patience is not None and len(losses) > patience:
            best_before = min(losses[:-patience])
            is_stuck = min(losses[-patience:]) > best_before * (1 - LEAST_GAIN)
        return self._agree(is_stuck)

    # --- several processes --------------------------------------------------------------------------------------------

    def _share_gradients(self) -> None:
        if not self._is_shared:
            return
        gradients = [tensor.grad for tensor in self._named.values() if tensor.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so: all go the same way."""
        if not self._is_shared:
            return flag
        flags = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's own state of the parameter, to read and to write."""
        for optimizer in self._optimizers:
            if any(parameter is member for group in optimizer.param_groups for member in group["params"]):
                return optimizer.state[parameter]
        raise KeyError(parameter)

    # --- state on disk ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state after the last step, unless it is there already. Keeps the newest two."""
        if not self.is_leader or self.step == self._saved_step:
            return
        self.progress.phase("saving a checkpoint")
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            tensors[f"model.{name}"] = parameter.detach()
            # What the loss does not reach, such as a pooler, has no state.
            for key, value in self._state_of(parameter).items():
                tensors[f"optimizer.{key}.{name}"] = value
        state = {
            "step": self.step,
            "num_steps": self.num_steps,
            "elapsed_s": self._elapsed_s,
            "num_tokens": self._num_tokens,
            "losses": self._losses,
            "stream": self._stream.state(),
            "records": [vars(record) for record in self.records],
        }
        save_state(checkpoint_directory(self.output, self.step), tensors, state)
        prune_checkpoints(self.output)
        self._saved_step = self.step

    def resume(self) -> bool:
        """Continues from the newest whole checkpoint below the output directory; False if there is none."""
        directory = find_resumable(self.output, notify=self.progress.message)
        if directory is None:
            return False
        tensors, state = load_state(directory)
        if self.options.num_steps is not None and state["step"] > self.options.num_steps:
            raise IsthmusError(
                f"steps: got {self.options.num_steps}, but {state['step']} are done already; steps count from the "
                f"run's beginning, so ask for {state['step']} or more."
            )
        self._stream.restore(state["stream"])
        with torch.no_grad():
            for name, parameter in self._named.items():
                saved = tensors.get(f"model.{name}")
                if saved is None or saved.shape != parameter.shape:
                    raise IsthmusError(f"resume: {directory} is of another model; resume with the one that wrote it")
                parameter.copy_(saved)
                for key in _STATE:
                    value = tensors.get(f"optimizer.{key}.{name}")
                    if value is not None:
                        self._state_of(parameter)[key] = value if key == "step" else value.to(self._device)
        self.step = self._saved_step = state["step"]
        self.num_steps = self.options.num_steps or state["num_steps"]
        self._elapsed_s, self._num_tokens, self._losses = state["elapsed_s"], state["num_tokens"], state["losses"]
        self.records = [TrainingRecord(**record) for record in state["records"]]
        self.progress.message(f"resuming after step {self.step} from {directory}")
        return True
