"""What ``isthmus simulate tune`` prints and writes. Loads torch only to read a checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from isthmus.reporting.environment import num_cpus_usable
from isthmus.reporting.human import human_bytes, human_s
from isthmus.simulation.tuning.clusters import find_cluster
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.popularity import find_popularity
from isthmus.simulation.tuning.run import POLICIES, RUNTIME_NAMES, Outcome, Popularity, Simulated, simulate_tuning
from isthmus.simulation.tuning.shapes import MOE_SHAPES
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.model import ModelSpec
from isthmus.spec.report import Spread
from isthmus.spec.serialization import to_json
from isthmus.spec.simulated_tune import SimulateTuneReport, SimulateTuneRow
from isthmus.spec.units import parse_names


@dataclass(frozen=True, kw_only=True)
class SimulateTuneOptions:
    """What ``isthmus simulate tune`` was asked for."""

    model: str
    cluster: str
    popularity: str = "uniform"
    policies: str = "all"
    num_devices: int | None = None
    num_stages: int | None = None
    batch: int = 128
    micro_batches: int | None = None
    seq_len: int = 128
    dtype: str = "fp32"
    steps: int = 2
    drift: float = 0.0
    seed: int = 0
    predictor_accuracy: float = 0.85


def simulate_tune(
    options: SimulateTuneOptions,
    *,
    report: Path | None = None,
    timeline: Path | None = None,
    console: Console | None = None,
) -> SimulateTuneReport:
    """Prints every policy's step, and writes a report with a table beside it, and timelines. Raises ``IsthmusError``
    for what cannot be asked; nothing is printed or written then."""
    console = console or Console()
    named = parse_names("policies", options.policies, (*POLICIES, *RUNTIME_NAMES))
    policies = tuple(dict.fromkeys(RUNTIME_NAMES.get(name, name) for name in named))
    spec, cluster = _model(options.model), find_cluster(options.cluster, options.num_devices)
    job = TuneJob(
        dtype=options.dtype,
        batch=options.batch,
        seq_len=options.seq_len,
        num_micro_batches=options.micro_batches or cluster.num_accelerators,
        num_stages=options.num_stages,
        predictor_accuracy=options.predictor_accuracy,
    )
    popularity = find_popularity(options.popularity, spec, drift=options.drift, seed=options.seed)
    found = _run(Costs(spec, cluster, job), popularity, policies, options.steps, timeline is not None)
    written = SimulateTuneReport(
        config=asdict(options),
        cluster=cluster,
        num_stages=len(found.stages),
        skewness=found.skewness,
        rows=tuple(row_of(outcome, job.batch) for outcome in found.outcomes.values()),
    )

    def title(num_stages: int) -> str:
        return (
            f"{options.model}, {cluster.num_accelerators} accelerators of {cluster.name}, {num_stages} stages, "
            f"{job.num_micro_batches} micro-batches, G = {found.skewness:.2f}, simulated"
        )

    console.print(title(len(found.stages)), highlight=False)
    console.print(_table(written))
    for line in _notes(written):
        console.print(line, highlight=False)
    if report is not None:
        atomic_write(report, to_json(written))
        atomic_write(report.with_suffix(".md"), markdown(title(len(found.stages)), written))
    if timeline is not None:
        _write_timelines(found, timeline, title)
    return written


def _run(
    costs: Costs, popularity: Callable[[], Popularity], policies: tuple[str, ...], num_steps: int, keeps_spans: bool
) -> Simulated:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(policies[0], total=num_steps * len(policies))

        def tell(policy: str, steps: int) -> None:
            done = policies.index(policy) * num_steps + steps
            progress.update(task, completed=done, description=f"{policy}, step {steps} of {num_steps}")

        return simulate_tuning(
            costs,
            popularity,
            policies=policies,
            num_steps=num_steps,
            keeps_spans=keeps_spans,
            num_processes=num_cpus_usable(),
            tell=tell,
        )


def _model(name: str) -> ModelSpec:
    if name in MOE_SHAPES:
        return MOE_SHAPES[name]
    path = Path(name)
    if not (path / "config.json").is_file() and not (path.name.endswith(".json") and path.is_file()):
        raise IsthmusError(
            f"model: got {name!r}, wanted a directory with a config.json or one of {', '.join(MOE_SHAPES)}"
        )
    # Only here, since it takes seconds: transformers knows what a configuration means.
    from isthmus.models.config import load_config, model_spec

    return model_spec(load_config(path if path.is_dir() else path.parent))


def row_of(outcome: Outcome, batch: int) -> SimulateTuneRow:
    """A policy's row of the report."""
    if not outcome.seconds:
        return SimulateTuneRow(policy=outcome.policy, step_s=None, note=outcome.note)
    p10, median, p90 = (float(value) for value in np.percentile(outcome.counted, (10, 50, 90)))
    row = SimulateTuneRow(
        policy=outcome.policy,
        step_s=Spread(median=median, p10=p10, p90=p90),
        sequences_per_s=batch / median,
        num_stages=len(outcome.stages),
        bound_s=outcome.bound_s * outcome.bubble_factor,
        bubble_factor=outcome.bubble_factor,
        bound_share=outcome.bound_s * outcome.bubble_factor / median,
        note=outcome.note,
    )
    last = outcome.last
    if last is None:
        return row

    def share(lane: str) -> float:
        return float(np.mean([busy.get(lane, 0.0) for busy in last.busy_s])) / last.seconds

    shares = {f"{lane}_share": share(lane) for lane in ("accelerator", "cpu_experts", "h2d", "d2h", "optimizer")}
    return replace(
        row,
        **shares,
        cpu_pairs_share=last.cpu_rows / last.num_rows if last.num_rows else 0.0,
        h2d_bytes=sum(moved.get("h2d", 0) for moved in last.num_bytes),
        d2h_bytes=sum(moved.get("d2h", 0) for moved in last.num_bytes),
    )


_COLUMNS = ("policy", "step", "seq/s", "bound", "accel", "CPU", "H2D", "D2H", "Adam", "pairs", "loaded")
_LEGEND = (
    "bound: share of the bound (affinity's: of that of steps that wait for the norm of all gradients); accel, CPU "
    "(experts), H2D, D2H, Adam: share of the step that each is busy; pairs: (token, expert) pairs computed on CPUs; "
    "loaded: by all accelerators"
)


def _cells(row: SimulateTuneRow) -> list[str]:
    if row.step_s is None:
        return [row.policy, "–", *[""] * (len(_COLUMNS) - 2)]
    # A cost model has no lanes.
    lanes = ["" for _ in range(7)]
    if row.accelerator_share:
        shares = (row.accelerator_share, row.cpu_experts_share, row.h2d_share, row.d2h_share, row.optimizer_share)
        lanes = [*(f"{share:.0%}" for share in shares), f"{row.cpu_pairs_share:.1%}", human_bytes(row.h2d_bytes)]
    return [row.policy, human_s(row.step_s.median), f"{row.sequences_per_s:.2f}", f"{row.bound_share:.0%}", *lanes]


def _table(report: SimulateTuneReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=0)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in report.rows:
        table.add_row(*_cells(row))
    return table


def _notes(report: SimulateTuneReport) -> list[str]:
    return [_LEGEND, *(f"{row.policy}: {row.note}" for row in report.rows if row.note)]


def markdown(title: str, report: SimulateTuneReport) -> str:
    """The table as it stands beside a report."""
    lines = [f"# {title}", "", f"| {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * (len(_COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in report.rows]
    lines += [line for note in _notes(report) for line in ("", note)]
    return "\n".join(lines) + "\n"


def _write_timelines(found: Simulated, path: Path, title: Callable[[int], str]) -> None:
    """One Chrome trace and one picture for each policy, of all devices."""
    from isthmus.reporting.devices_plot import write_timelines

    for policy, outcome in found.outcomes.items():
        if outcome.timelines:
            target = path.with_name(f"{path.stem}-{policy}.json")
            whose = f"{policy}: {title(len(outcome.stages))}"
            write_timelines(outcome.timelines, outcome.stages, target, title=whose)
