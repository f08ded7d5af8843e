"""AdamW on the CPU, unit by unit, on the memory of a ``ParameterStore``; exact global-norm clipping.

The optimizer owns which units have a gradient in this step, the gradients' norm, and which units have been stepped.
A step is: contributions (``gradient_destination`` or ``add_gradient``) and ``finish_gradient`` during the backward
pass, ``begin_step`` once the last gradient is in, ``step_unit`` for every unit in any order and from any thread,
``end_step``. Units may be stepped while the next forward pass already runs, as long as each is stepped before its
weight is read: a unit accepts the next step's gradient from the moment it has been stepped.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.spec.model import UnitKey
from isthmus.tuning.parameter_store import ParameterStore

CHUNK_NUMEL = 1 << 19
"""Parameters converted at a time: 2 MiB of FP32 stay in cache between the conversion, AdamW and the cast back, and the
calls' overhead (some 15 µs) stays below a tenth of the arithmetic."""
NORM_ROW_NUMEL = 512
"""Squares summed in FP32 before FP64 takes over: one FP32 sum over 16 million is off by 1e-3, rows of 512 by 3e-8."""


class NonFiniteGradient(IsthmusError):
    """The gradient's norm is infinite or not a number; nothing has been stepped. ``units`` are the ones to blame."""

    def __init__(self, step: int, norm: float, units: tuple[UnitKey, ...]) -> None:
        self.units = units
        named = ", ".join(str(unit) for unit in units[:4]) + (", …" if len(units) > 4 else "")
        super().__init__(
            f"gradient norm is {norm} in step {step}, want a finite number; not finite in {len(units)} units: {named}. "
            "Lower the learning rate or check the data, and resume from the last checkpoint."
        )


class StoreOptimizer:
    """AdamW with the results of ``torch.optim.AdamW(fused=True)`` and ``torch.nn.utils.clip_grad_norm_``.

    ``weight_decay`` applies to every parameter. ``clip_norm`` None: no clipping, the norm is still computed. Every
    method may be called from any thread; only contributions to the SAME unit through ``gradient_destination`` must be
    written one after the other by the callers.
    """

    def __init__(
        self,
        store: ParameterStore,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        if learning_rate < 0:
            raise ValueError(f"learning_rate: got {learning_rate}, want a number from 0 up")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, want two numbers from 0 up to, but not including, 1")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm: got {clip_norm}, want a number above 0, or None for no clipping")
        self.num_steps = 0
        """Steps ended so far."""
        self.store = store
        self._learning_rate = learning_rate
        self._betas = betas
        self._eps = eps
        self._weight_decay = weight_decay
        self._clip_norm = clip_norm
        self._scratch = threading.local()
        self._unit_locks = {key: threading.Lock() for key in store.keys}
        self._changed = threading.Condition()  # guards everything below
        self._present: set[UnitKey] = set()
        self._squared_norms: dict[UnitKey, float] = {}
        self._pending: set[UnitKey] = set()
        self._stepping: set[UnitKey] = set()
        self._step_gradients: frozenset[UnitKey] = frozenset()
        self._step = 0
        self._step_count = torch.tensor(0.0)
        self._step_learning_rate = learning_rate
        self._step_scale = 1.0

    # --- gradients ---------------------------------------------------------------------------------------------------

    def gradient_destination(self, key: UnitKey) -> tuple[Tensor, bool]:
        """The unit's gradient buffer (numel,), and whether to add to it: the first contribution of a step overwrites.

        Marks the unit as having a gradient. Raises RuntimeError while the unit still has to take the step that began.
        """
        with self._changed:
            if key in self._pending or key in self._stepping:
                raise RuntimeError(f"{key}: a gradient for the next step arrives before step {self._step} was taken")
            accumulate = key in self._present
            self._present.add(key)
            self._squared_norms.pop(key, None)
        return self.store.gradient(key), accumulate

    def add_gradient(self, key: UnitKey, flat: Tensor) -> None:
        """Copies or adds ``flat`` (numel,), a host tensor of the unit's dtype or FP32, into the unit's gradient."""
        with self._unit_locks[key]:
            destination, accumulate = self.gradient_destination(key)
            if flat.shape != destination.shape:
                raise ValueError(f"flat: got shape {tuple(flat.shape)} for {key}, want {tuple(destination.shape)}")
            if accumulate:
                destination.add_(flat)
            else:
                destination.copy_(flat)

    def finish_gradient(self, key: UnitKey) -> None:
        """All contributions to the unit are in: computes their squared norm, once. Without any, does nothing."""
        with self._changed:
            if key not in self._present or key in self._squared_norms:
                return
        squared_norm = self._squared_norm(self.store.gradient(key))
        with self._changed:
            self._squared_norms[key] = squared_norm

    def discard_gradients(self) -> None:
        """Forgets every contribution made for the next step (a batch that is to be skipped or repeated)."""
        with self._changed:
            self._present.clear()
            self._squared_norms.clear()

    def global_norm(self) -> float:
        """The Euclidean norm over all finished gradients; the same whatever the order they came in."""
        with self._changed:
            return math.sqrt(math.fsum(self._squared_norms.values()))

    def _squared_norm(self, gradient: Tensor) -> float:
        total = 0.0
        for part in gradient.split(max(1, gradient.numel()) if gradient.dtype == torch.float32 else CHUNK_NUMEL):
            if part.dtype != torch.float32:
                part = self._scratch_chunk()[: part.numel()].copy_(part)
            num_rows = part.numel() // NORM_ROW_NUMEL
            rows, rest = part.split([num_rows * NORM_ROW_NUMEL, part.numel() - num_rows * NORM_ROW_NUMEL])
            if num_rows:
                row_norms = torch.linalg.vector_norm(rows.view(num_rows, NORM_ROW_NUMEL), dim=1).double()
                total += torch.dot(row_norms, row_norms).item()
            if rest.numel():
                total += torch.dot(rest, rest).item()
        return total

    # --- the step ----------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, learning_rate: float | None = None) -> float:
        """Closes this step's gradients, fixes the clip coefficient min(1, clip_norm / (norm + 1e-6)), returns the norm.

        ``step`` counts from 1 and must follow the last one (Adam's bias correction depends on it). Gradients that
        nobody finished are finished here. Raises NonFiniteGradient, with nothing changed, where the norm is not finite.
        """
        if self._step != self.num_steps:
            raise RuntimeError(f"step {self._step} has not ended; step every unit and call end_step first")
        if step != self.num_steps + 1:
            raise ValueError(f"step: got {step}, want {self.num_steps + 1}, the one after the last that ended")
        for key in sorted(self._present):
            self.finish_gradient(key)
        norm = self.global_norm()
        with self._changed:
            if not math.isfinite(norm):
                culprits = (key for key, squared in self._squared_norms.items() if not math.isfinite(squared))
                raise NonFiniteGradient(step, norm, tuple(sorted(culprits)))
            self._step = step
            self._step_count = torch.tensor(float(step))
            self._step_learning_rate = self._learning_rate if learning_rate is None else learning_rate
            self._step_scale = 1.0 if self._clip_norm is None else _clip_coefficient(norm, self._clip_norm)
            self._step_gradients = frozenset(self._present)
            self._present.clear()
            self._squared_norms.clear()
            self._pending = set(self.store.keys)
        return norm

    def step_unit(self, key: UnitKey) -> None:
        """``step_units`` of one unit."""
        self.step_units((key,))

    def step_units(self, keys: Iterable[UnitKey]) -> None:
        """AdamW on these units' masters and moments, and the rounded result into their weights.

        Each unit takes each step once, whoever asks first; on return all of ``keys`` have taken it (blocks while
        another thread is at it). A unit without a gradient in this step behaves as one whose gradient is zero.
        Give many small units in one call: those that lie side by side in the store are stepped as one range.
        """
        wanted = list(dict.fromkeys(keys))
        with self._changed:
            mine = [key for key in wanted if key in self._pending]
            self._pending.difference_update(mine)
            self._stepping.update(mine)
        try:
            for key in mine:
                if key not in self._step_gradients:
                    self.store.gradient(key).zero_()
            for run in self.store.runs(mine):
                self._step_run(run)
        finally:
            with self._changed:
                self._stepping.difference_update(mine)
                self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self._stepping.isdisjoint(wanted))

    def is_stepped(self, key: UnitKey) -> bool:
        """Whether the unit's weight is that after the last step that began."""
        with self._changed:
            return key not in self._pending and key not in self._stepping

    def pending(self) -> tuple[UnitKey, ...]:
        """Units that nobody has begun to step, sorted."""
        with self._changed:
            return tuple(sorted(self._pending))

    def end_step(self) -> None:
        """Closes the step that began. Raises RuntimeError where a unit has not taken it."""
        with self._changed:
            if self._step != self.num_steps + 1:
                raise RuntimeError(f"no step is under way: {self.num_steps} have ended; call begin_step first")
            if self._pending or self._stepping:
                num_left = len(self._pending) + len(self._stepping)
                raise RuntimeError(f"step {self._step} cannot end: {num_left} units have not taken it; call step_units")
            self.num_steps = self._step

    def state(self) -> dict[str, int]:
        """What a checkpoint needs beside the store's moments, as JSON. Raises RuntimeError in the middle of a step."""
        if self._step != self.num_steps:
            raise RuntimeError(f"step {self._step} is under way; step every unit and call end_step before saving")
        return {"num_steps": self.num_steps}

    def load_state(self, state: dict[str, int]) -> None:
        """Takes over what ``state`` returned, and forgets any gradients. The moments come back through the store."""
        self.discard_gradients()
        self.num_steps = self._step = state["num_steps"]

    def _step_run(self, run: list[UnitKey]) -> None:
        span = self.store.span
        master, exp_avg, exp_avg_sq = span("master", run), span("exp_avg", run), span("exp_avg_sq", run)
        weight, gradient = span("weight", run), span("gradient", run)
        is_fp32 = gradient.dtype == torch.float32
        if is_fp32 and self._step_scale == 1.0:
            self._adamw(master, gradient, exp_avg, exp_avg_sq)
            return
        # Scaling a copy in cache costs less than AdamW's own grad_scale, which writes the scaled gradient back to
        # memory, and rounds as clip_grad_norm_ does (a product, where grad_scale divides).
        chunks = (tensor.split(CHUNK_NUMEL) for tensor in (master, gradient, exp_avg, exp_avg_sq, weight))
        for master_part, gradient_part, exp_avg_part, exp_avg_sq_part, weight_part in zip(*chunks, strict=True):
            scratch = self._scratch_chunk()[: master_part.numel()]
            if is_fp32:
                torch.mul(gradient_part, self._step_scale, out=scratch)
            else:
                scratch.copy_(gradient_part)
                if self._step_scale != 1.0:
                    scratch.mul_(self._step_scale)
            self._adamw(master_part, scratch, exp_avg_part, exp_avg_sq_part)
            if not is_fp32:
                weight_part.copy_(master_part)

    def _adamw(self, parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [parameter],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [self._step_count],
            lr=self._step_learning_rate,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=self._weight_decay,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )

    def _scratch_chunk(self) -> Tensor:
        """The calling thread's own FP32 scratch, (CHUNK_NUMEL,)."""
        if not hasattr(self._scratch, "chunk"):
            self._scratch.chunk = torch.empty(CHUNK_NUMEL, dtype=torch.float32)
        return self._scratch.chunk


def _clip_coefficient(norm: float, clip_norm: float) -> float:
    """In FP32, as ``torch.nn.utils.clip_grad_norm_`` computes it."""
    return (clip_norm / (torch.tensor(norm) + 1e-6)).clamp(max=1.0).item()
