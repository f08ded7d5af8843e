"""Which process gets which layers: agreed on before any weight is read, from what each measures of its part of its host
and from the memory that accelerators and hosts have."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from isthmus.planning.layer_needs import MAPPED_POLICY, Place, profiled_problem
from isthmus.planning.mapping import LEAST_GAIN, choose_cuts, predict_cuts
from isthmus.planning.memory import Blueprint
from isthmus.planning.stages import Division
from isthmus.profiling.limits import cpu_quota, free_memory
from isthmus.reporting.environment import cpu_name, num_cpus_usable
from isthmus.reporting.human import human_s
from isthmus.spec.plan import LayerMapping, Stage
from isthmus.spec.profile import Profile
from isthmus.spec.serialization import from_json, to_json
from isthmus.tuning.pipeline.links import Links

NOTHING_TO_CHOOSE = "as many stages as layers"
AS_PUBLISHED = "stages of equal size, as the policy is published"


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a process has, as it tells the others. Of one host, those whose ``kind`` is the same are alike, and count as
    one for what is measured: that two of them measure a few percent apart must not move a layer."""

    host: str
    memory_group: str
    """Whose limit ``free_bytes`` is: processes of one host and group take from the same."""
    free_bytes: int
    kind: str
    memory_bytes: int | None
    """Of its accelerator; None: it has no memory of its own."""

    @classmethod
    def here(cls, accelerator: str, memory_bytes: int | None, num_cores: int | None) -> Seat:
        free_bytes, group = free_memory()
        held = [cpu_name(), num_cores or num_cpus_usable(), cpu_quota(), accelerator, os.environ.get("OMP_NUM_THREADS")]
        return cls(
            host=socket.gethostname(),
            memory_group=group,
            free_bytes=free_bytes,
            kind=repr(held),
            memory_bytes=memory_bytes,
        )


def agree_on_layers(
    links: Links,
    equal: Division,
    *,
    policy: str,
    num_micro_batches: int,
    num_in_flight: int,
    seat: Callable[[], Seat],
    blueprint: Callable[[], Blueprint],
    measure: Callable[[], Profile],
) -> tuple[Division, LayerMapping]:
    """``equal``, or as many other stages where ranks differ enough (``choose_cuts``). The same on all; all call it.

    Nothing is asked where there is nothing to choose: else ``seat()`` of all, ``blueprint()`` of rank 0, ``measure()``
    of one process of each kind and host, of a host one after the other: what they take of it while they measure would
    count twice. Blocks for seconds, where nothing was kept.
    """
    if policy != MAPPED_POLICY:
        return equal, _untimed(equal, AS_PUBLISHED)
    if len(equal.stages) == equal.stages[-1].last_layer + 1:
        return equal, _untimed(equal, NOTHING_TO_CHOOSE)
    seats = [Seat(**fact) for fact in links.gather(asdict(seat()), "what it computes with")]
    profiles = _measured(links, seats, measure)
    fact = None
    if not links.rank:
        fact = to_json(map_seats(blueprint(), seats, profiles, equal.stages, num_micro_batches, num_in_flight))
    mapping = from_json(LayerMapping, links.from_first(fact, "which layers are whose"))
    return Division(stages=mapping.stages, num_ranks=links.size, order=mapping.ranks[: links.size]), mapping


def _untimed(division: Division, reason: str) -> LayerMapping:
    return LayerMapping(stages=division.stages, ranks=division.ranks, reason=reason)


def _measured(links: Links, seats: Sequence[Seat], measure: Callable[[], Profile]) -> list[Profile]:
    """Of each rank, the same on all."""
    turns: dict[str, dict[str, int]] = {}
    for rank, seat in enumerate(seats):
        turns.setdefault(seat.host, {}).setdefault(seat.kind, rank)
    found: dict[int, Profile] = {}
    for turn in range(max(map(len, turns.values()))):
        whose = [list(ranks.values())[turn] for ranks in turns.values() if turn < len(ranks)]
        mine = to_json(measure()) if links.rank in whose else None
        told = links.gather(mine, "what it measured")
        found |= {rank: from_json(Profile, told[rank]) for rank in whose}
    return [found[turns[seat.host][seat.kind]] for seat in seats]


def map_seats(
    blueprint: Blueprint,
    seats: Sequence[Seat],
    profiles: Sequence[Profile],
    equal: Sequence[Stage],
    num_micro_batches: int,
    num_in_flight: int,
) -> LayerMapping:
    """The mapping for processes with these seats. Pure: the same for the same. That it fits is not promised: what does
    not is refused, with all figures, by who asks for the memory."""
    pools = list(dict.fromkeys((seat.host, seat.memory_group) for seat in seats))
    free_bytes = [min(seat.free_bytes for seat in seats if (seat.host, seat.memory_group) == pool) for pool in pools]
    # Each as under a root of its own, so that the order stays that of ranks: they have taken their GPUs in it.
    devices = [
        (
            Place(host=pools.index((seat.host, seat.memory_group)), root=rank, memory_bytes=seat.memory_bytes),
            profiles[rank],
        )
        for rank, seat in enumerate(seats)
    ]
    problem = profiled_problem(blueprint, devices, free_bytes, num_micro_batches, num_in_flight)
    evenly, found = predict_cuts(problem, equal), choose_cuts(problem, equal)
    if found.stages == evenly.stages:
        reason = f"no others are predicted {LEAST_GAIN:.0%} shorter than stages of equal size"
    elif found.short_bytes < evenly.short_bytes:
        reason = f"with stages of equal size {evenly.short_bytes / 2**30:.3g} GiB of memory are missing"
    else:
        reason = f"predicted {1 - found.step_s / evenly.step_s:.0%} shorter than stages of equal size"
    return LayerMapping(
        stages=found.stages,
        ranks=found.devices,
        reason=reason,
        load_s=found.load_s,
        step_s=found.step_s,
        equal_stages_step_s=evenly.step_s,
    )


def told(mapping: LayerMapping) -> str:
    """In a few words, for people."""
    whose = []
    for rank in sorted(set(mapping.ranks)):
        own = [stage for stage, of in zip(mapping.stages, mapping.ranks, strict=True) if of == rank]
        spans = ", ".join(
            f"{stage.first_layer}" + (f"-{stage.last_layer}" if stage.last_layer > stage.first_layer else "")
            for stage in own
        )
        seconds = "" if mapping.load_s is None else f" ({human_s(mapping.load_s[rank])})"
        whose.append(f"rank {rank} {spans}{seconds}")
    step = "" if mapping.step_s is None else f"; a step is predicted to take {human_s(mapping.step_s)}"
    return f"layers: {'; '.join(whose)}{step}; {mapping.reason}"
