"""The loop of a fine-tuning run: steps, evaluation, checkpoints, signals, records for the report."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.reporting.progress import StepView, TrainingProgress
from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import StepRecord
from isthmus.training.checkpoints import checkpoint_directory, find_resumable, prune_checkpoints
from isthmus.training.interruption import Interrupted, StopSignals
from isthmus.training.schedule import learning_rate_at
from isthmus.tuning.bound import StepBounds
from isthmus.tuning.checkpoint import Crew, load_training_state, save_training_state
from isthmus.tuning.data.batches import BatchStream, MicroBatch
from isthmus.tuning.optimizer import NonFiniteGradient
from isthmus.tuning.pipeline.company import StepFacts
from isthmus.tuning.session import Session, StepOutcome


class NonFiniteLoss(IsthmusError):
    """Training stopped because the loss or a gradient was not finite. The last good checkpoint is kept."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How long, how fast, what to keep."""

    num_steps: int
    learning_rate: float
    schedule: str
    warmup: float
    eval_every: int
    save_every: int
    """0: only at the end."""
    timeline_steps: int = 2


class Trainer:
    """Owns one run in ``output`` from its first step (or the one after the last checkpoint) to its last.

    Of several processes each has one, and all call the same methods; rank 0's keeps the records.
    """

    def __init__(
        self,
        session: Session,
        stream: BatchStream,
        evaluation: list[MicroBatch],
        output: Path,
        options: TrainerOptions,
        recorder: Recorder,
        progress: TrainingProgress,
        stop: StopSignals,
    ) -> None:
        self.session = session
        self.stream = stream
        self.evaluation = evaluation
        self.output = output
        self.options = options
        self.recorder = recorder
        self.progress = progress
        self.stop = stop
        self.records: list[StepRecord] = []
        self.counts: list[dict[int, list[int]]] = []
        self._bounds = StepBounds(session)
        self._saved_step = -1
        self._first_step = 1
        self._links = session.links
        self._crew = Crew(links=session.links, layouts=session.model.layouts) if session.links else None

    # --- state on disk ----------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continues from the newest whole checkpoint below the output directory; False if there is none.

        Raises ``IsthmusError`` where it does not fit model, data or number of steps, ``CheckpointError`` where all are
        broken.
        """
        directory = None
        if self._links is None or not self._links.rank:
            directory = find_resumable(self.output, notify=self.progress.message)
        if self._links is not None:
            name = self._links.from_first(directory and str(directory.absolute()), "the checkpoint to resume from")
            directory = Path(name) if name else None
        if directory is None:
            return False
        session = self.session
        state, tensors = load_training_state(directory, session.store, session.optimizer, crew=self._crew)
        self.session.weights_changed()
        self.stream.load_state_dict(state["stream"])
        self.records = [StepRecord(**record) for record in state["records"]]
        predictor = self.session.placement.predictor
        if predictor is not None and tensors:
            predictor.load_state_dict(tensors)
        self._saved_step = len(self.records)
        if self._saved_step > self.options.num_steps:
            raise IsthmusError(
                f"steps: got {self.options.num_steps}, but {self._saved_step} are done already; steps count from the "
                f"run's beginning, so ask for {self._saved_step} or more."
            )
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
            crew=self._crew,
        )
        if self._links is None or not self._links.rank:
            prune_checkpoints(self.output)
        self._saved_step = step

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the end. Raises ``NonFiniteLoss`` or ``Interrupted``; the last checkpoint is whole in any case."""
        options = self.options
        self._first_step = len(self.records) + 1
        if self.evaluation and not self.records:
            self._evaluate(0)
        with self.stop.deferred():
            while len(self.records) < options.num_steps:
                step = len(self.records) + 1
                self.recorder.keep_spans = self._is_in_timeline(step)
                self._step(step)
                if step == options.num_steps or (options.save_every and step % options.save_every == 0):
                    self.save()
                if (number := self._requested()) is not None:
                    self.save()
                    message = f"stopped by {number.name} after step {step}; its state is saved. Continue with --resume."
                    raise Interrupted(message, number)

    def _requested(self) -> signal.Signals | None:
        """The signal that asks for an end; that of any rank, since all stop after the same step."""
        requested = self.stop.requested
        if self._links is None:
            return requested
        number = max(self._links.gather(int(requested or 0), "whether to stop"))
        return signal.Signals(number) if number else None

    def _is_in_timeline(self, step: int) -> bool:
        """A few steps in the steady state: from the middle on of those that this process takes."""
        num_left = self.options.num_steps - self._first_step + 1
        first = self._first_step + max(0, min(num_left // 2, num_left - self.options.timeline_steps))
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
            raise self._not_finite(step, "the norm of the gradient is not finite") from error
        if not outcome.is_finite:
            raise self._not_finite(step, f"the loss is {outcome.loss}")
        bound_s, outcome = self._with_others(outcome)
        duration_s = recorder.now_s() - start_s
        is_due = step % options.eval_every == 0 or step == options.num_steps
        evaluation_loss = self._evaluate(step) if self.evaluation and is_due else None
        self.counts.append(outcome.counts.counts_LE)
        optimizer_s = recorder.busy_s("optimizer") - optimizer_before_s
        self._record(step, rate, outcome, bound_s, duration_s, optimizer_s, evaluation_loss)

    def _with_others(self, outcome: StepOutcome) -> tuple[float, StepOutcome]:
        """(the step's bound, its outcome on all ranks together)."""
        bound_s = self._bounds.bound_s(outcome)
        if self._links is None:
            return bound_s, outcome
        bytes_here = {"h2d_bytes": outcome.h2d_bytes, "d2h_bytes": outcome.d2h_bytes}
        facts = StepFacts(counts=outcome.counts, bound_s=bound_s, **bytes_here).of_all(self._links)
        bytes_everywhere = {"h2d_bytes": facts.h2d_bytes, "d2h_bytes": facts.d2h_bytes}
        return facts.bound_s, replace(outcome, counts=facts.counts, **bytes_everywhere)

    def _evaluate(self, step: int) -> float:
        loss = self.session.evaluate(self.evaluation)
        if not math.isfinite(loss):
            raise self._not_finite(step, f"the evaluation loss is {loss}")
        self.progress.evaluation(step, loss)
        return loss

    def _record(
        self,
        step: int,
        rate: float,
        outcome: StepOutcome,
        bound_s: float,
        duration_s: float,
        optimizer_s: float,
        evaluation_loss: float | None,
    ) -> None:
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
        kept = "nothing had been saved yet."
        if self._saved_step > 0:
            directory = checkpoint_directory(self.output, self._saved_step)
            kept = f"{directory}, the state after step {self._saved_step}, is kept."
        return NonFiniteLoss(
            f"step {step}: {what}; {kept} Look at the data; try a lower --learning-rate, --clip-norm 1 or --dtype fp32."
            + ("" if self._links is None else " If one process alone has a loss, several cannot train this model.")
        )
