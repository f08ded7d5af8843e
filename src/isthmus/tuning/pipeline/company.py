"""What the processes of one run agree on before it and after every step, and how those of one host share its cores."""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from isthmus.profiling.limits import free_memory
from isthmus.reporting.environment import num_cpus_usable
from isthmus.spec.errors import IsthmusError
from isthmus.spec.pinning import pin
from isthmus.spec.report import TuneSummary
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.timeline import Timeline
from isthmus.tuning.engine import StepCounts
from isthmus.tuning.pipeline.links import Links


def require_same(links: Links, facts: Mapping[str, object]) -> None:
    """Raises ``IsthmusError`` naming the first of ``facts`` (JSON) in which a rank differs from rank 0."""
    told = links.gather(dict(facts), "what it was started with")
    for rank, others in enumerate(told):
        for name, value in others.items():
            if value != told[0].get(name):
                raise IsthmusError(
                    f"{name}: rank {rank} got {value!r}, rank 0 {told[0].get(name)!r}; wanted the same everywhere: "
                    "start all processes with the same command, and see that they read the same files."
                )


def share_cores(links: Links) -> int:
    """Pins this process to its share of the cores that the processes of its host were given together; leaves them where
    they are if they were given different ones. Returns the number of cores to compute on: no more than
    ``OMP_NUM_THREADS``, unless that is 1, which torchrun sets by itself."""
    mine = [socket.gethostname(), sorted(os.sched_getaffinity(0))]
    told = links.gather(mine, "the cores it may use")
    here = [rank for rank, (host, _) in enumerate(told) if host == mine[0]]
    num_cores, cores = num_cpus_usable(), mine[1]
    if all(told[rank][1] == cores for rank in here):
        # Gloo has threads by now, too.
        pin(own_cores(cores, here.index(links.rank), len(here)))
        num_cores = max(1, num_cores // len(here))
    asked = int(os.environ.get("OMP_NUM_THREADS", "1"))
    return min(num_cores, asked) if asked > 1 else num_cores


def own_cores(cores: list[int], place: int, num_processes: int) -> list[int]:
    """Of a host's ``cores`` those of its process number ``place``: a run of them, or where there are more processes
    than cores one that it shares with its neighbours. No core has two processes more than another."""
    first, last = (len(cores) * at // num_processes for at in (place, place + 1))
    return cores[first:last] or [cores[first]]


@contextmanager
def in_one_directory(made: AbstractContextManager[Path], links: Links | None, what: str) -> Iterator[Path]:
    """The directory ``made``, of which all processes write their part: rank 0 enters it, tells the others where it is,
    and leaves it in the end; all must see it. ``links`` None: this process is alone."""
    if links is not None and links.rank:
        yield Path(links.from_first(None, what))
        return
    with made as directory:
        if links is not None:
            links.from_first(str(directory.absolute()), what)
        yield directory


def require_shared(directory: Path, links: Links) -> None:
    """Raises ``IsthmusError`` on all, naming the first rank that does not see what rank 0 writes to ``directory``: long
    before it would have to write there too."""
    with in_one_directory(_made_in(directory), links, "where the run's files go") as seen:
        told = links.gather([socket.gethostname(), seen.is_dir()], "whether it sees the run's files")
    for rank, (host, sees) in enumerate(told):
        if not sees:
            raise IsthmusError(
                f"output: rank {rank}, on {host}, does not see what rank 0, on {told[0][0]}, writes to {seen.parent}; "
                "wanted a directory that all processes see: name one of a shared file system."
            )


@contextmanager
def _made_in(directory: Path) -> Iterator[Path]:
    with TemporaryDirectory(prefix=".seen-by-all-", dir=directory) as made:
        yield Path(made)


def require_memory(needed_bytes: int, links: Links | None) -> None:
    """Raises ``IsthmusError`` on all if a host has less memory free than its processes need together for what they keep
    on it: before any of it is taken."""
    free_bytes, group = free_memory()
    mine = [socket.gethostname(), group, free_bytes, needed_bytes]
    told = [mine] if links is None else links.gather(mine, "the memory it needs")
    for host, group in dict.fromkeys((host, group) for host, group, _, _ in told):
        here = [rank for rank, one in enumerate(told) if one[:2] == [host, group]]
        free, needed = min(told[rank][2] for rank in here), sum(told[rank][3] for rank in here)
        if needed > free:
            who = "" if links is None else f" for rank{'s' * (len(here) > 1)} {', '.join(map(str, here))}"
            raise IsthmusError(
                f"memory: {host} has {free / 2**30:.1f} GiB free{who}, wanted {needed / 2**30:.1f} GiB for weights, "
                "gradients and Adam's moments: free some, or start processes on more hosts (fewer on this one)."
            )


def of_all_ranks(summary: TuneSummary, links: Links | None) -> TuneSummary:
    """With the host memory of all processes together, and the accelerator memory of the one that took most."""
    if links is None:
        return summary
    told = links.gather(
        [summary.peak_host_bytes, summary.needed_host_bytes, summary.peak_accelerator_bytes], "the memory it took"
    )
    peaks, needed, on_accelerator = zip(*told, strict=True)
    return replace(
        summary,
        peak_host_bytes=sum(peaks),
        needed_host_bytes=sum(needed),
        peak_accelerator_bytes=max(on_accelerator),
    )


def timelines_of_all(timeline: Timeline, links: Links | None) -> tuple[Timeline, ...]:
    """Every rank's, in the order of ranks and on rank 0's clock; on other ranks nothing. Clocks are compared where
    steps end: there all wait for rank 0's word, so they are as far apart as a message takes to travel."""
    if links is None:
        return (timeline,)
    timelines = [from_json(Timeline, text) for text in links.to_first(to_json(timeline), "its timeline")]
    return tuple(_on_clock_of(timelines[0], other) for other in timelines)


def _on_clock_of(first: Timeline, other: Timeline) -> Timeline:
    ends = zip(first.steps, other.steps, strict=True)
    later_s = statistics.median(there[2] - here[2] for here, there in ends) if first.steps else 0.0
    return Timeline(
        spans=tuple(replace(span, start_s=span.start_s - later_s, end_s=span.end_s - later_s) for span in other.spans),
        steps=tuple((step, start_s - later_s, end_s - later_s) for step, start_s, end_s in other.steps),
    )


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What each rank has to tell of a step."""

    counts: StepCounts
    h2d_bytes: int
    d2h_bytes: int
    bound_s: float

    def of_all(self, links: Links) -> StepFacts:
        """Sums over ranks; of bounds the largest. The same on all."""
        counts = self.counts
        computed = [counts.num_on_cpu, counts.num_on_accelerator, counts.cpu_tokens, counts.tokens]
        told = links.gather(
            {
                "counts": [[layer, tokens] for layer, tokens in counts.counts_LE.items()],
                "sums": [*computed, self.h2d_bytes, self.d2h_bytes],
                "bound": self.bound_s,
            },
            "what happened in the step",
        )
        sums = [sum(column) for column in zip(*(fact["sums"] for fact in told), strict=True)]
        return replace(
            self,
            counts=StepCounts({layer: tokens for fact in told for layer, tokens in fact["counts"]}, *sums[:4]),
            h2d_bytes=sums[4],
            d2h_bytes=sums[5],
            bound_s=max(fact["bound"] for fact in told),
        )
