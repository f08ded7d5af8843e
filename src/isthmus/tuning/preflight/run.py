"""``isthmus plan tune`` as a function: question, prediction, what would help, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Console

from isthmus.planning.flights import check_in_flight
from isthmus.planning.memory import Blueprint
from isthmus.reporting.devices_plot import write_timelines
from isthmus.reporting.progress import TrainingProgress
from isthmus.simulation.tuning.clusters import find_cluster
from isthmus.simulation.tuning.popularity import find_popularity
from isthmus.simulation.tuning.run import Popularity
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.plan_tune import Change, PlanTuneReport
from isthmus.spec.profile import Profile
from isthmus.spec.serialization import to_json
from isthmus.spec.tune_cluster import TuneCluster
from isthmus.spec.units import parse_bytes
from isthmus.tuning.preflight.blueprint import read_blueprint
from isthmus.tuning.preflight.changes import find_changes, limiting
from isthmus.tuning.preflight.machine import MachineOptions, this_machine
from isthmus.tuning.preflight.predict import SIMULATED, Prediction, Question, predict
from isthmus.tuning.preflight.rehearse import rehearse
from isthmus.tuning.preflight.show import show

TITLE = "isthmus plan tune"


@dataclass(frozen=True, kw_only=True)
class PlanTuneOptions:
    """What ``isthmus plan tune`` was asked for. Names and meanings are those of ``isthmus tune``."""

    model: str
    cluster: str | None = None
    """None: this machine."""
    seq_len: int = 512
    micro_batch_size: int = 1
    micro_batches: int = 4
    dtype: str = "bf16"
    method: str = "full"
    num_layers: int | None = None
    num_stages: int | None = None
    num_devices: int | None = None
    policy: str = "affinity"
    micro_batches_in_flight: int | None = None
    popularity: str = "uniform"
    accelerator: str = "auto"
    emulate: str | None = None
    accelerator_memory: str | None = None
    changes: bool = True
    """Whether to look for what would help."""
    timeline: str | None = None
    """Of this machine: where the predicted step goes, as a Chrome trace."""

    def check(self) -> None:
        """Raises ``IsthmusError`` for what can be seen to be wrong without the model."""
        for name in ("seq_len", "micro_batch_size", "micro_batches"):
            if getattr(self, name) < 1:
                raise IsthmusError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        check_in_flight(self.micro_batches_in_flight, self.micro_batches)
        if self.policy not in SIMULATED:
            raise IsthmusError(f"policy: got {self.policy!r}, wanted one of {', '.join(SIMULATED)}")
        if self.method != "full":
            raise IsthmusError(f"method: got {self.method!r}, wanted full: all parameters are trained")
        if self.cluster is None:
            self.machine().check()
            if self.num_layers is not None:
                raise IsthmusError("num_layers: is for a described cluster; this machine is measured with whole models")
        elif self.emulate is not None or self.accelerator != "auto" or self.timeline is not None:
            raise IsthmusError("accelerator, emulate, timeline: are of this machine; leave them or --cluster out")

    def machine(self) -> MachineOptions:
        memory = self.accelerator_memory
        return MachineOptions(
            accelerator=self.accelerator,
            emulate=self.emulate,
            memory_bytes=None if memory is None else parse_bytes(memory, "accelerator_memory"),
            num_processes=self.num_devices or 1,
            num_stages=self.num_stages,
        )


def plan_tune(
    options: PlanTuneOptions, *, report: Path | None = None, console: Console | None = None, plain: bool | None = None
) -> PlanTuneReport:
    """Prints whether it fits, what a step takes and what would help, and writes a report. Reads no weights. Blocks for
    seconds, for large models minutes. Raises ``ValueError`` or ``OSError`` for what cannot be asked."""
    options.check()
    named = None if options.cluster is None else find_cluster(options.cluster, options.num_devices)

    @cache
    def blueprint(dtype: str) -> Blueprint:
        return read_blueprint(
            options.model,
            dtype=dtype,
            seq_len=options.seq_len,
            micro_batch_size=options.micro_batch_size,
            num_layers=options.num_layers,
        )

    with TrainingProgress(1, title=TITLE, plain=plain) as progress:
        progress.phase("reading the configuration")
        own = blueprint(options.dtype)
        popularity = find_popularity(options.popularity, own.spec)
    cluster, profile = _measured(options, own) if named is None else (_with_memory(named, options), None)
    question = _question(options, own, cluster, popularity)
    with TrainingProgress(1, title=TITLE, plain=plain) as progress:
        progress.phase("predicting")
        found = predict(question)
        changes = find_changes(question, found, blueprint, progress.phase) if options.changes else ()
        if profile is not None:
            found = _rehearsed(options, question, profile, found)
            changes = tuple(_at_rate(change, found) for change in changes)
    written = PlanTuneReport(
        config=asdict(options),
        cluster=cluster,
        num_parameters=own.spec.num_parameters,
        skewness=found.skewness,
        fits=found.fits,
        devices=found.devices,
        hosts=found.hosts,
        links=found.links,
        step=found.step,
        limiting=limiting(found, changes),
        reason=found.reason,
        changes=changes,
        micro_batches_in_flight=found.num_in_flight,
    )
    show(written, _title(options, written), console or Console())
    if report is not None:
        atomic_write(report, to_json(written))
    return written


def _question(
    options: PlanTuneOptions, blueprint: Blueprint, cluster: TuneCluster, popularity: Callable[[], Popularity]
) -> Question:
    return Question(
        blueprint=blueprint,
        cluster=cluster,
        micro_batch_size=options.micro_batch_size,
        micro_batches=options.micro_batches,
        seq_len=options.seq_len,
        num_stages=options.num_stages,
        policy=options.policy,
        popularity=popularity,
        micro_batches_in_flight=options.micro_batches_in_flight,
        num_steps=1 if options.popularity == "uniform" else 2,
    )


def _rehearsed(options: PlanTuneOptions, question: Question, profile: Profile, found: Prediction) -> Prediction:
    found, timelines, stages = rehearse(question, profile, found)
    if options.timeline is not None and timelines:
        write_timelines(timelines, stages, options.timeline, title=f"{options.policy}, predicted")
    return found


def _at_rate(change: Change, found: Prediction) -> Change:
    """What was simulated says how much a change gains; how fast it is then follows from the rehearsal."""
    if change.gain is None or found.step is None:
        return change
    return replace(change, tokens_per_s=change.gain * found.step.tokens_per_s)


def _measured(options: PlanTuneOptions, blueprint: Blueprint) -> tuple[TuneCluster, Profile]:
    return this_machine(
        options.model,
        blueprint,
        options.machine(),
        seq_len=options.seq_len,
        micro_batch_size=options.micro_batch_size,
        num_batches=options.micro_batches,
    )


def _with_memory(cluster: TuneCluster, options: PlanTuneOptions) -> TuneCluster:
    """Accelerators of which so much may be used."""
    if options.accelerator_memory is None:
        return cluster
    num_bytes = parse_bytes(options.accelerator_memory, "accelerator_memory")
    hosts = [replace(host, accelerator=replace(host.accelerator, memory_bytes=num_bytes)) for host in cluster.hosts]
    return replace(cluster, hosts=tuple(hosts))


def _title(options: PlanTuneOptions, report: PlanTuneReport) -> str:
    skew = "" if report.skewness is None else f", G = {report.skewness:.2f}"
    number, in_flight = options.micro_batches, report.micro_batches_in_flight
    flight = "" if in_flight in (None, number) else f" ({in_flight} in flight at most)"
    return (
        f"{options.model} ({_count(report.num_parameters)} parameters), {options.dtype}, "
        f"{number} micro-batches{flight} of {options.micro_batch_size} × {options.seq_len} tokens{skew}, on "
        f"{report.cluster.num_accelerators} accelerator{'s' * (report.cluster.num_accelerators > 1)} of "
        f"{report.cluster.name}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"
