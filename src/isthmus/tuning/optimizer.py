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
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import UnitKey
from isthmus.tuning.parameter_store import ParameterStore

CHUNK_NUMEL = 1 << 19
"""Parameters a thread converts at a time: 2 MiB of FP32 stay in cache between the conversion, AdamW and the cast back,
and the calls' overhead stays below a tenth of the arithmetic."""
MIN_CHUNK_NUMEL = 1 << 15
"""Ranges up to this are not worth a second thread."""
NORM_ROW_NUMEL = 512
"""Squares summed in FP32 before FP64 takes over: one FP32 sum over 16 million is off by 1e-3, rows of 512 by 3e-8."""

Work = TypeVar("Work")


class NonFiniteGradient(IsthmusError):
    """The gradient's norm is infinite or not a number; nothing has been stepped. ``units`` are the ones to blame."""

    def __init__(self, step: int, norm: float, units: tuple[UnitKey, ...]) -> None:
        self.units = units
        named = ", ".join(str(unit) for unit in units[:4]) + (", …" if len(units) > 4 else "")
        where = f"not finite in {len(units)} units: {named}" if units else "what is not finite is another process's"
        super().__init__(
            f"gradient norm is {norm} in step {step}, want a finite number; {where}. "
            "Lower the learning rate or check the data, and resume from the last checkpoint."
        )


class StoreOptimizer:
    """AdamW with the results of ``torch.optim.AdamW(fused=True)`` and ``torch.nn.utils.clip_grad_norm_``.

    ``weight_decay`` applies to every parameter. ``clip_norm`` None: no clipping, the norm is still computed. Every
    method may be called from any thread; only contributions to the SAME unit through ``gradient_destination`` must be
    written one after the other by the callers. Arithmetic runs on ``num_threads`` threads (default: as many as torch
    uses here) of the optimizer's own, whoever calls. ``sum_over_ranks`` (several processes, each with units of its own)
    makes of this store's squared norm the whole model's, the same bits everywhere; called once a step.
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
        num_threads: int | None = None,
        sum_over_ranks: Callable[[float], float] = lambda squared_norm: squared_norm,
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
        self._sum_over_ranks = sum_over_ranks
        self._num_threads = num_threads or torch.get_num_threads()
        self._pool = _pool_of_single_threads(self._num_threads)
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
        if flat.shape != (self.store.numel(key),):
            raise ValueError(f"flat: got shape {tuple(flat.shape)} for {key}, want {(self.store.numel(key),)}")
        with self._unit_locks[key]:
            destination, accumulate = self.gradient_destination(key)
            if accumulate:
                destination.add_(flat)
            else:
                destination.copy_(flat)

    def finish_gradient(self, key: UnitKey) -> None:
        """All contributions to the unit are in: computes their squared norm, once. Without any, does nothing."""
        with self._changed:
            if key not in self._present or key in self._squared_norms:
                return
        gradient = self.store.gradient(key)
        if gradient.numel() <= MIN_CHUNK_NUMEL:
            squared_norms = [self._squared_norm(gradient)]
        else:
            squared_norms = []
            self._spread(
                lambda part: squared_norms.append(self._squared_norm(part)),
                self._split(gradient, is_converted=gradient.dtype != torch.float32),
            )
        with self._changed:
            self._squared_norms[key] = math.fsum(squared_norms)

    def discard_gradients(self) -> None:
        """Forgets every contribution made for the next step (a batch that is to be skipped or repeated)."""
        with self._changed:
            self._present.clear()
            self._squared_norms.clear()

    def global_norm(self) -> float:
        """The Euclidean norm over all finished gradients, of all ranks; the same whatever the order they came in."""
        with self._changed:
            squared = list(self._squared_norms.values())
        return math.sqrt(self._sum_over_ranks(math.fsum(squared)))

    def _squared_norm(self, part: Tensor) -> float:
        if part.dtype != torch.float32:
            part = self._scratch_chunk()[: part.numel()].copy_(part)
        num_rows = part.numel() // NORM_ROW_NUMEL
        rows, rest = part.split([num_rows * NORM_ROW_NUMEL, part.numel() - num_rows * NORM_ROW_NUMEL])
        row_norms = torch.linalg.vector_norm(rows.view(num_rows, NORM_ROW_NUMEL), dim=1).double()
        return torch.dot(row_norms, row_norms).item() + torch.dot(rest, rest).item()

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
            chunks = [chunk for run in self.store.runs(mine) for chunk in self._chunks(run)]
            self._spread(self._step_chunk, chunks)
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

    def close(self) -> None:
        """Ends the worker threads. Idempotent; no step may follow."""
        self._pool.shutdown()

    def state(self) -> dict[str, int]:
        """What a checkpoint needs beside the store's moments, as JSON. Raises RuntimeError in the middle of a step."""
        if self._step != self.num_steps:
            raise RuntimeError(f"step {self._step} is under way; step every unit and call end_step before saving")
        return {"num_steps": self.num_steps}

    def load_state(self, state: dict[str, int]) -> None:
        """Takes over what ``state`` returned, and forgets any gradients. The moments come back through the store."""
        self.discard_gradients()
        self.num_steps = self._step = state["num_steps"]

    def _chunks(self, run: list[UnitKey]) -> list[tuple[Tensor, ...]]:
        """A run's (master, gradient, exp_avg, exp_avg_sq, weight), cut into chunks."""
        spans = [self.store.span(kind, run) for kind in ("master", "gradient", "exp_avg", "exp_avg_sq", "weight")]
        is_converted = not self._is_direct(spans[1])
        return list(zip(*(self._split(span, is_converted=is_converted) for span in spans), strict=True))

    def _is_direct(self, gradient: Tensor) -> bool:
        """Whether AdamW can read the gradient where it lies."""
        return gradient.dtype == torch.float32 and self._step_scale == 1.0

    def _step_chunk(self, chunk: tuple[Tensor, ...]) -> None:
        master, gradient, exp_avg, exp_avg_sq, weight = chunk
        if self._is_direct(gradient):
            self._adamw(master, gradient, exp_avg, exp_avg_sq)
            return
        # Scaling a copy in cache costs less than AdamW's own grad_scale, which writes the scaled gradient back to
        # memory, and rounds as clip_grad_norm_ does (a product, where grad_scale divides).
        scratch = self._scratch_chunk()[: master.numel()]
        if gradient.dtype == torch.float32:
            torch.mul(gradient, self._step_scale, out=scratch)
        else:
            scratch.copy_(gradient)
            if self._step_scale != 1.0:
                scratch.mul_(self._step_scale)
        self._adamw(master, scratch, exp_avg, exp_avg_sq)
        if weight.dtype != torch.float32:
            weight.copy_(master)

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

    # --- threads -----------------------------------------------------------------------------------------------------

    def _split(self, flat: Tensor, *, is_converted: bool) -> Sequence[Tensor]:
        """Parts of whole cache lines, one or more for every thread; what is converted must fit the scratch."""
        length = max(MIN_CHUNK_NUMEL, -(-flat.numel() // self._num_threads))
        if is_converted:
            length = min(length, CHUNK_NUMEL)
        return flat.split(-(-length // NORM_ROW_NUMEL) * NORM_ROW_NUMEL)

    def _spread(self, do: Callable[[Work], None], pieces: Sequence[Work]) -> None:
        """Does each piece once, on whichever of the optimizer's threads is free. Blocks; raises the first error."""
        remaining = deque(pieces)

        def drain() -> None:
            while True:
                try:
                    piece = remaining.popleft()
                except IndexError:
                    return
                do(piece)

        for future in [self._pool.submit(drain) for _ in range(min(self._num_threads, len(pieces)))]:
            future.result()

    def _scratch_chunk(self) -> Tensor:
        """The calling thread's own FP32 scratch, (CHUNK_NUMEL,)."""
        if not hasattr(self._scratch, "chunk"):
            self._scratch.chunk = torch.empty(CHUNK_NUMEL, dtype=torch.float32)
        return self._scratch.chunk


def _clip_coefficient(norm: float, clip_norm: float) -> float:
    """In FP32, as ``torch.nn.utils.clip_grad_norm_`` computes it."""
    return (clip_norm / (torch.tensor(norm) + 1e-6)).clamp(max=1.0).item()


def _pool_of_single_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads whose torch operators do not spread over further threads.

    Each works through chunks on its own, and they meet once per call. With torch's threads inside each operator there
    would be four barriers per chunk, each of which may cost a time slice where cores are shared.
    """
    everywhere = torch.get_num_threads()
    ready = threading.Barrier(num_threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes torch take over the number in this thread before it changes again
        ready.wait()

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="isthmus-adamw", initializer=start)
    for _ in range(num_threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(everywhere)  # new threads of others would inherit the 1
    return pool
