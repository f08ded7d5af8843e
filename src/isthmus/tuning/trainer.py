"""The loop of a fine-tuning run: steps, evaluation, checkpoints, signals, records for the report."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from isthmus.errors import IsthmusError
from isthmus.reporting.progress import StepView, TuneProgress
from isthmus.reporting.recorder import Recorder
from isthmus.spec.report import StepRecord
from isthmus.tuning.bound import StepBounds
from isthmus.tuning.checkpoint import (
    checkpoint_directory,
    find_resumable,
    load_training_state,
    prune_checkpoints,
    save_training_state,
)
from isthmus.tuning.data.batches import BatchStream, MicroBatch
from isthmus.tuning.optimizer import NonFiniteGradient
from isthmus.tuning.schedule import learning_rate_at
from isthmus.tuning.session import Session, StepOutcome


class NonFiniteLoss(IsthmusError):
    """Training stopped because the loss or a gradient was not finite. The last good checkpoint is kept."""


class Interrupted(IsthmusError):
    """Training was stopped by a signal after its state was saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How long, how fast, what to keep."""

    num_steps: int
    learning_rate: float
    schedule: str
    warmup: float
    eval_every: int
    save_every: int
    timeline_steps: int = 2


class Trainer:
    """Owns one run in ``output`` from its first step (or the one after the last checkpoint) to its last."""

    def __init__(
        self,
        session: Session,
        stream: BatchStream,
        evaluation: list[MicroBatch],
        output: Path,
        options: TrainerOptions,
        recorder: Recorder,
        progress: TuneProgress,
    ) -> None:
        self.session = session
        self.stream = stream
        self.evaluation = evaluation
        self.output = output
        self.options = options
        self.recorder = recorder
        self.progress = progress
        self.records: list[StepRecord] = []
        self.counts: list[dict[int, list[int]]] = []
        self._bounds = StepBounds(session)
        self._saved_step = -1

    # --- state on disk ----------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continues from the newest whole checkpoint below the output directory, if there is one."""
        directory = find_resumable(self.output, notify=self.progress.message)
        if directory is None:
            return False
        state, tensors = load_training_state(directory, self.session.store, self.session.optimizer)
        self.session.weights_changed()
        self.stream.load_state_dict(state["stream"])
        self.records = [StepRecord(**record) for record in state["records"]]
        predictor = self.session.placement.predictor
        if predictor is not None and tensors:
            predictor.load_state_dict(tensors)
        self._saved_step = len(self.records)
        self.progress.message(f"resuming after step {self._saved_step} from {directory}")
        return True

    def save(self) -> None:
        """Writes the state after the last step, unless it is there already. Keeps the newest two."""
        step = len(self.records)
        if step == self._saved_step:
            return
        self.session.finish()
        predictor = self.session.placement.predictor
        save_training_state(
            checkpoint_directory(self.output, step),
            self.session.store,
            self.session.optimizer,
            {"stream": self.stream.state_dict(), "records": [vars(record) for record in self.records]},
            predictor.state_dict() if predictor is not None else None,
            on_progress=lambda done, total: self.progress.phase("saving a checkpoint", done / max(1, total)),
        )
        prune_checkpoints(self.output)
        self._saved_step = step

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the end. Raises ``NonFiniteLoss`` or ``Interrupted``; whatever is raised, the last checkpoint is whole."""
        options = self.options
        with _stop_requests() as stop:
            if self.evaluation and not self.records:
                self.progress.evaluation(0, self.session.evaluate(self.evaluation))
            while len(self.records) < options.num_steps:
                step = len(self.records) + 1
                self.recorder.keep_spans = self._is_in_timeline(step)
                self._step(step)
                is_last = step == options.num_steps
                if stop.number is not None:
                    self.save()
                    raise Interrupted(
                        f"stopped by {signal.Signals(stop.number).name} after step {step}; state saved. Continue with --resume.",
                        128 + stop.number,
                    )
                if options.save_every and step % options.save_every == 0 and not is_last:
                    self.save()
            self.session.finish()
            self.save()

    def _is_in_timeline(self, step: int) -> bool:
        """A few steps in the steady state: from the middle on."""
        first = max(1, min(self.options.num_steps // 2 + 1, self.options.num_steps - self.options.timeline_steps + 1))
        return first <= step < first + self.options.timeline_steps

    def _step(self, step: int) -> None:
        options, recorder = self.options, self.recorder
        rate = learning_rate_at(
            step - 1,
            schedule=options.schedule,
            learning_rate=options.learning_rate,
            num_steps=options.num_steps,
            warmup=options.warmup,
        )
        batches = self.stream.next_step()
        optimizer_before_s, start_s = recorder.busy_s("optimizer"), recorder.now_s()
        try:
            outcome = self.session.train_step(batches, step=step, learning_rate=rate)
        except NonFiniteGradient as error:
            raise self._not_finite(step, f"the gradient norm is {error.norm}") from error
        if not outcome.is_finite:
            raise self._not_finite(step, f"the loss is {outcome.loss}")
        duration_s = recorder.now_s() - start_s
        evaluation_loss = None
        if self.evaluation and (step % options.eval_every == 0 or step == options.num_steps):
            evaluation_loss = self.session.evaluate(self.evaluation)
            self.progress.evaluation(step, evaluation_loss)
        self.counts.append(outcome.counts.counts_LE)
        self._record(step, rate, outcome, duration_s, recorder.busy_s("optimizer") - optimizer_before_s, evaluation_loss)

    def _record(
        self, step: int, rate: float, outcome: StepOutcome, duration_s: float, optimizer_s: float, evaluation_loss: float | None
    ) -> None:
        bound_s = self._bounds.bound_s(outcome)
        record = StepRecord(
            step=step,
            loss=outcome.loss,
            num_tokens=outcome.num_tokens,
            duration_s=duration_s,
            bound_s=bound_s,
            h2d_bytes=outcome.h2d_bytes,
            d2h_bytes=outcome.d2h_bytes,
            num_experts_on_cpu=outcome.counts.num_on_cpu,
            num_experts_on_accelerator=outcome.counts.num_on_accelerator,
            optimizer_s=optimizer_s,
            learning_rate=rate,
            gradient_norm=outcome.gradient_norm,
            evaluation_loss=evaluation_loss,
        )
        self.records.append(record)
        accelerator, profile = self.session.accelerator, self.session.profile
        link_s = outcome.h2d_bytes * profile.h2d_s_per_byte
        self.progress.step(
            StepView(
                step=step,
                loss=record.loss,
                learning_rate=rate,
                tokens_per_s=record.num_tokens / duration_s,
                num_experts_on_cpu=record.num_experts_on_cpu,
                num_experts_on_accelerator=record.num_experts_on_accelerator,
                copy_engine_use=min(1.0, link_s / duration_s),
                bound_share=bound_s / duration_s,
                accelerator_bytes=accelerator.peak_bytes,
                accelerator_budget_bytes=accelerator.budget_bytes,
            )
        )

    def _not_finite(self, step: int, what: str) -> NonFiniteLoss:
        kept = f"The state after step {self._saved_step} is kept in {self.output}." if self._saved_step > 0 else "No step had been saved yet."
        return NonFiniteLoss(
            f"step {step}: {what}; no weight was changed by this step. {kept} Try a lower --learning-rate, --clip-norm 1, or --dtype fp32."
        )


class _Stop:
    number: int | None = None


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the present step; a second one interrupts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
