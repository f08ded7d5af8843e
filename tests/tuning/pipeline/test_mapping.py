"""Layers go where they take least, every process comes to the same, and noise moves nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.tuning.rehearsal.test_play import profile_of

from isthmus.models.tiny import tiny_config
from isthmus.planning.curves import scale
from isthmus.planning.layer_needs import Place, mapping_problem
from isthmus.planning.memory import Blueprint, host_bytes
from isthmus.planning.stages import Division, divide
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import LayerMapping
from isthmus.spec.profile import ExpertTimes, Profile
from isthmus.tuning.pipeline import company
from isthmus.tuning.pipeline.company import require_memory
from isthmus.tuning.pipeline.links import Links
from isthmus.tuning.pipeline.mapping import Seat, agree_on_layers, told
from isthmus.tuning.preflight.blueprint import blueprint_of, packed_inputs

NUM_LAYERS, NUM_TOKENS, MICRO_BATCHES = 8, 16, 4
AMPLE = 1 << 40


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    config = tiny_config("mixtral", num_hidden_layers=NUM_LAYERS)
    return blueprint_of(config, "fp32", packed_inputs(config, 1, NUM_TOKENS))


class Together(Links):
    """Ranks in threads; what one tells, all hear."""

    def __init__(self, rank: int, facts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._facts, self._barrier = rank, len(facts), facts, barrier

    def gather(self, fact: object, what: str) -> list[Any]:
        self._facts[self.rank] = fact
        self._barrier.wait(timeout=60)
        told = list(self._facts)
        self._barrier.wait(timeout=60)
        return told

    def from_first(self, fact: object, what: str) -> Any:
        return self.gather(fact, what)[0]


def together(number: int, run: Callable[[Links], Any]) -> list[Any]:
    """What ``run`` returns on each rank, or raises."""
    barrier = threading.Barrier(number)
    facts: list[Any] = [None] * number
    found: list[Any] = [None] * number

    def one(rank: int) -> None:
        try:
            found[rank] = run(Together(rank, facts, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def slower(profile: Profile, times: float) -> Profile:
    experts = {
        key: ExpertTimes(
            **{
                name: scale(getattr(curves, name), times)
                for name in ("cpu_forward", "cpu_backward", "accelerator_forward", "accelerator_backward")
            }
        )
        for key, curves in profile.experts.items()
    }
    names = [name for name in vars(profile) if name.endswith(("_s_per_token", "_s_per_parameter"))]
    return replace(profile, experts=experts, **{name: times * getattr(profile, name) for name in names})


def seat(kind: str, *, host: str = "a", memory_bytes: int | None = None, free_bytes: int = AMPLE) -> Seat:
    return Seat(host=host, memory_group="", free_bytes=free_bytes, kind=kind, memory_bytes=memory_bytes)


def agreed(
    blueprint: Blueprint, seats: Sequence[Seat], profiles: Sequence[Profile], num_stages: int, policy: str = "affinity"
) -> tuple[Division, LayerMapping, list[int]]:
    """(what all come to, and who measured, in their order)."""
    equal = divide(blueprint.spec, num_ranks=len(seats), num_stages=num_stages)
    measured: list[int] = []

    def run(links: Links) -> tuple[Division, LayerMapping]:
        def measure() -> Profile:
            measured.append(links.rank)
            return profiles[links.rank]

        return agree_on_layers(
            links,
            equal,
            policy=policy,
            num_micro_batches=MICRO_BATCHES,
            num_in_flight=MICRO_BATCHES,
            seat=lambda: seats[links.rank],
            blueprint=lambda: blueprint,
            measure=measure,
        )

    first, *others = together(len(seats), run)
    assert all(other == first for other in others)
    return *first, measured


def layers(division: Division) -> list[int]:
    return [len(division.layers_of(rank)) for rank in range(division.num_ranks)]


def test_a_slower_process_gets_fewer_layers(blueprint: Blueprint) -> None:
    profile = profile_of(blueprint, is_separate=False)
    for number_of_slow in range(2):
        profiles = [slower(profile, 3.0 if rank == number_of_slow else 1.0) for rank in range(2)]
        division, mapping, measured = agreed(blueprint, [seat("one"), seat("other")], profiles, 4)
        assert layers(division)[number_of_slow] <= 2 and measured == [0, 1]
        assert mapping.step_s is not None and mapping.equal_stages_step_s is not None
        assert mapping.step_s < 0.9 * mapping.equal_stages_step_s
        said = told(mapping)
        assert "rank 1 " in said and "shorter than stages of equal size" in said and "a step is predicted" in said


def test_of_processes_that_are_alike_one_measures_for_all(blueprint: Blueprint) -> None:
    profile = profile_of(blueprint, is_separate=False)
    profiles = [profile, slower(profile, 3.0), profile, slower(profile, 1.02)]
    seats = [seat("alike"), seat("alike"), seat("alike", host="b"), seat("alike", host="b")]
    division, mapping, measured = agreed(blueprint, seats, profiles, 4)
    assert sorted(measured) == [0, 2] and layers(division) == [2, 2, 2, 2]
    assert "no others are predicted 5% shorter" in mapping.reason


def test_an_accelerator_with_little_memory_gets_fewer_layers(blueprint: Blueprint) -> None:
    profile = profile_of(blueprint, is_separate=True)
    roomy = 1 << 30
    wide = agreed(blueprint, [seat("x", memory_bytes=roomy)] * 2, [profile] * 2, 2)
    assert layers(wide[0]) == [4, 4]
    # What three layers keep, and what any has beside.
    places = [Place(host=0, root=rank, memory_bytes=roomy) for rank in range(2)]
    needs = mapping_problem(blueprint, places, [[1.0] * NUM_LAYERS] * 2, [AMPLE], MICRO_BATCHES, MICRO_BATCHES)
    beside = roomy - needs.devices[1].memory_bytes
    tight = beside + 3 * needs.layers[1].kept_bytes
    division, mapping, _ = agreed(
        blueprint, [seat("x", memory_bytes=roomy), seat("x", memory_bytes=tight)], [profile] * 2, 2
    )
    assert layers(division) == [5, 3] and "GiB of memory are missing" in mapping.reason


def test_baselines_and_a_stage_for_each_layer_are_not_measured(blueprint: Blueprint) -> None:
    profile = profile_of(blueprint, is_separate=False)
    profiles = [profile, slower(profile, 4.0)]
    for number, policy, reason in ((4, "paper", "as the policy is published"), (8, "affinity", "as many stages as")):
        division, mapping, measured = agreed(blueprint, [seat("one"), seat("other")], profiles, number, policy)
        assert layers(division) == [4, 4] and not measured and reason in mapping.reason and mapping.step_s is None


def test_ranks_of_two_hosts_in_turns_go_round_host_by_host(blueprint: Blueprint) -> None:
    profile = profile_of(blueprint, is_separate=False)
    seats = [seat("x", host=host) for host in "abab"]
    division, mapping, _ = agreed(blueprint, seats, [profile] * 4, 4)
    assert division.ranks == mapping.ranks == (0, 2, 1, 3)
    assert [division.rank_of(layer) for layer in range(0, NUM_LAYERS, 2)] == [0, 2, 1, 3]


def test_a_host_without_enough_memory_is_refused_by_all(blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(host_bytes(blueprint.layouts.values()).values())
    monkeypatch.setattr(company, "free_memory", lambda: (3 << 30, ""))
    found = together(3, lambda links: require_memory(1 << 30, links))
    assert found == [None] * 3
    found = together(3, lambda links: require_memory((1 + links.rank) << 30, links))
    for error in found:
        assert isinstance(error, IsthmusError)
        assert "has 3.0 GiB free for ranks 0, 1, 2, wanted 6.0 GiB for weights, gradients" in str(error)
    monkeypatch.setattr(company, "free_memory", lambda: (needed - 1, ""))
    with pytest.raises(IsthmusError, match=r"memory: .* GiB free, wanted .* GiB for weights"):
        require_memory(needed, None)
    require_memory(needed - 1, None)
