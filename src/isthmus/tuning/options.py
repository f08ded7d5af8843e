"""The options of a fine-tuning run as one value: checked before anything slow happens, and handed on in parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from isthmus.models.skeleton import torch_dtype
from isthmus.planning.flights import check_in_flight
from isthmus.spec.errors import IsthmusError
from isthmus.spec.units import parse_bytes, parse_emulate
from isthmus.training.schedule import learning_rate_at
from isthmus.tuning.pipeline.links import BACKENDS
from isthmus.tuning.pipeline.wire import WIRES
from isthmus.tuning.policies import POLICIES
from isthmus.tuning.session import SessionOptions
from isthmus.tuning.trainer import TrainerOptions


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What ``isthmus tune`` was asked for. Names, defaults and meanings are those of ``isthmus.tuning.run.tune``."""

    model: str | Path
    data: str | Path
    output: str | Path
    columns: str | None
    eval_data: str | Path | None
    steps: int
    seq_len: int
    micro_batch_size: int
    micro_batches: int
    micro_batches_in_flight: int | None
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip_norm: float
    dtype: str
    seed: int
    policy: str
    accelerator: str
    accelerator_memory: str | int | None
    num_stages: int | None
    num_layers: int | None
    emulate: str | None
    cpu_speed: float
    eval_every: int
    eval_batches: int
    save_every: int
    report: str | Path | None
    timeline: str | Path | None
    trace: str | Path | None
    resume: bool
    overwrite: bool
    plain: bool | None
    wire: str | None
    backend: str
    rank_timeout: float

    def check(self) -> None:
        """Raises ``ValueError`` for what can be seen to be wrong without model, data and machine."""
        data = ("seq_len", "micro_batch_size", "micro_batches", "eval_batches")
        for name in (*data, "steps", "eval_every"):
            if getattr(self, name) < 1:
                raise IsthmusError(f"{name}: got {getattr(self, name)}, wanted at least 1.")
        check_in_flight(self.micro_batches_in_flight, self.micro_batches)
        for name in ("learning_rate", "weight_decay", "clip_norm", "save_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise IsthmusError(f"{name}: got {getattr(self, name)}, wanted a finite number from 0 up.")
        if not 0 < self.cpu_speed <= 1:
            raise IsthmusError(
                f"cpu_speed: got {self.cpu_speed}, wanted a fraction above 0 and at most 1, such as 0.25."
            )
        if self.policy not in POLICIES:
            raise IsthmusError(f"policy: got {self.policy!r}, wanted one of {', '.join(sorted(POLICIES))}.")
        if self.resume and self.overwrite:
            raise IsthmusError("resume, overwrite: got both; --resume continues a run, --overwrite deletes it first.")
        if self.rank_timeout <= 0:
            raise IsthmusError(f"rank_timeout: got {self.rank_timeout}, wanted seconds above 0.")
        if self.wire not in (None, *WIRES):
            raise IsthmusError(f"wire: got {self.wire!r}, wanted one of {', '.join(WIRES)}, or left out.")
        if self.backend not in BACKENDS:
            raise IsthmusError(f"backend: got {self.backend!r}, wanted one of {', '.join(BACKENDS)}.")
        if self.backend == "nccl" and self.accelerator not in ("auto", "cuda"):
            raise IsthmusError(
                f"backend: got nccl, which is for GPUs, with accelerator {self.accelerator}: leave it out, or say "
                "--accelerator cuda."
            )
        torch_dtype(self.dtype)
        learning_rate_at(
            0, schedule=self.schedule, learning_rate=self.learning_rate, num_steps=self.steps, warmup=self.warmup
        )
        self.session()

    def session(self) -> SessionOptions:
        memory = self.accelerator_memory
        return SessionOptions(
            dtype=self.dtype,
            policy=self.policy,
            accelerator=self.accelerator,
            accelerator_memory_bytes=None if memory is None else parse_bytes(memory, "accelerator_memory"),
            emulation=parse_emulate(self.emulate) if self.emulate else None,
            cpu_speed=self.cpu_speed,
            num_stages=self.num_stages,
            num_layers=self.num_layers,
            num_in_flight=self.micro_batches_in_flight,
            wire=self.wire,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm or None,
            seed=self.seed,
        )

    def trainer(self) -> TrainerOptions:
        return TrainerOptions(
            num_steps=self.steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            eval_every=self.eval_every,
            save_every=self.save_every,
        )

    def plain_values(self) -> dict[str, object]:
        """As JSON values, for the report."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
