"""What is to be played through: a model, a machine, and how its processes train."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from isthmus.planning.flights import smallest_flight
from isthmus.planning.layer_needs import MAPPED_POLICY
from isthmus.planning.memory import Blueprint, Footprint, flight_that_fits
from isthmus.planning.stages import Division, divide
from isthmus.spec.plan import Stage
from isthmus.spec.profile import Profile
from isthmus.tuning.pipeline.mapping import Seat, map_seats


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run. ``memory_bytes``: of each accelerator; without a separate one it says nothing. ``num_cores``: of the host,
    for all processes together."""

    blueprint: Blueprint
    profile: Profile
    num_processes: int
    num_cores: int
    memory_bytes: int
    micro_batches: int
    num_stages: int | None
    policy: str
    micro_batches_in_flight: int | None = None
    """None: as many as fit."""

    @property
    def is_separate(self) -> bool:
        return self.profile.hardware.link is not None

    def part(self, rank: int) -> Footprint:
        division = self.division
        stages = division.stages_of(rank) if self.num_processes > 1 else ()
        return self.blueprint.part(division.layers_of(rank), stages=stages)

    @cached_property
    def num_in_flight(self) -> int:
        """As many on every process. Raises ``IsthmusError`` where the least do not fit."""
        number, asked = self.micro_batches, self.micro_batches_in_flight
        if not self.is_separate:
            return smallest_flight(number, asked or number)
        return min(
            flight_that_fits(self.part(rank), number, self.policy, self.memory_bytes, asked)
            for rank in range(self.num_processes)
        )

    @cached_property
    def division(self) -> Division:
        """As ``tune`` divides the model where all its processes measure what this profile says."""
        spec, number = self.blueprint.spec, self.num_processes
        if number == 1:
            return Division(stages=(Stage(first_layer=0, last_layer=spec.num_layers - 1),), num_ranks=1)
        equal = divide(spec, num_ranks=number, num_stages=self.num_stages)
        if self.policy != MAPPED_POLICY:
            return equal
        seat = Seat(
            host="here",
            memory_group="",
            free_bytes=self.profile.hardware.host_memory_bytes,
            kind="",
            memory_bytes=self.memory_bytes if self.is_separate else None,
        )
        mapping = map_seats(
            self.blueprint,
            [seat] * number,
            [self.profile] * number,
            equal.stages,
            self.micro_batches,
            smallest_flight(self.micro_batches, self.micro_batches_in_flight),
        )
        return Division(stages=mapping.stages, num_ranks=number, order=mapping.ranks[:number])
