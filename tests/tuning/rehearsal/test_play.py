"""Steps that are played through: everything is done once, nobody waits for ever, and seconds add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.planning.conftest import line

from isthmus.models.tiny import tiny_config
from isthmus.planning.memory import Blueprint, minimum_bytes
from isthmus.simulation.tuning.machine import cluster_of
from isthmus.simulation.tuning.popularity import find_popularity
from isthmus.spec.hardware import Hardware, LinkRate
from isthmus.spec.profile import ExpertTimes, Profile, Slowdown
from isthmus.tuning.preflight import rehearse as rehearsing
from isthmus.tuning.preflight.blueprint import blueprint_of, packed_inputs
from isthmus.tuning.preflight.predict import Question, predict
from isthmus.tuning.rehearsal import run as running
from isthmus.tuning.rehearsal.guess import Guess
from isthmus.tuning.rehearsal.run import NUM_STEPS, Played, play, whole_steps
from isthmus.tuning.rehearsal.scenario import Scenario

NUM_LAYERS, NUM_TOKENS, MICRO_BATCHES, TOP_K = 8, 16, 4, 2


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    config = tiny_config("mixtral", num_hidden_layers=NUM_LAYERS)
    return blueprint_of(config, "fp32", packed_inputs(config, 1, NUM_TOKENS))


def profile_of(blueprint: Blueprint, *, is_separate: bool, **changes: Any) -> Profile:
    """Every row a microsecond forward and two backward, on either side; all else a few."""
    expert = next(layer for layer in blueprint.spec.layers if layer is not None)
    link = LinkRate(h2d_bytes_per_s=1e8, d2h_bytes_per_s=1e8) if is_separate else None
    curves = ExpertTimes(
        cpu_forward=line(0.0, 1e-6),
        cpu_backward=line(0.0, 2e-6),
        accelerator_forward=line(0.0, 1e-6),
        accelerator_backward=line(0.0, 2e-6),
    )
    profile = Profile(
        hardware=Hardware(
            cpu_name="cpu",
            num_cpu_threads=1,
            host_memory_bytes=1 << 30,
            accelerator="emulated" if is_separate else "host",
            accelerator_name="emulated" if is_separate else "host",
            accelerator_memory_bytes=0,
            link=link,
        ),
        dtype="fp32",
        experts={Profile.expert_key(expert.hidden_size, expert.intermediate_size, expert.has_gate): curves},
        h2d_s_per_byte=1e-8 if is_separate else 0.0,
        d2h_s_per_byte=1e-8 if is_separate else 0.0,
        h2d_duplex_s_per_byte=1e-8 if is_separate else 0.0,
        d2h_duplex_s_per_byte=1e-8 if is_separate else 0.0,
        copy_latency_s=0.0,
        copy_window=2,
        optimizer_s_per_parameter=1e-9,
        dense_forward_s_per_token=3e-6,
        dense_backward_s_per_token=6e-6,
        outer_forward_s_per_token=4e-6,
        outer_backward_s_per_token=8e-6,
        norm_s_per_parameter=1e-10,
    )
    return replace(profile, **changes)


def scenario_of(blueprint: Blueprint, *, is_separate: bool, **changes: Any) -> Scenario:
    scenario = Scenario(
        blueprint=blueprint,
        profile=profile_of(blueprint, is_separate=is_separate),
        num_processes=1,
        num_cores=2,
        memory_bytes=1 << 30,
        micro_batches=MICRO_BATCHES,
        num_stages=None,
        policy="affinity",
    )
    return replace(scenario, **changes)


def played(
    blueprint: Blueprint, *, is_separate: bool, num_steps: int = 3, times_decisions: bool = False, **changes: Any
) -> Played:
    scenario = scenario_of(blueprint, is_separate=is_separate, **changes)
    popularity = find_popularity("gini=0.4", blueprint.spec)()
    steps = whole_steps(popularity.steps(NUM_TOKENS * MICRO_BATCHES), num_steps)
    return play(scenario, steps, times_decisions=times_decisions)


def test_in_place_a_step_is_the_sum_of_all_that_is_computed(blueprint: Blueprint) -> None:
    tokens = NUM_TOKENS * MICRO_BATCHES
    spec = blueprint.spec
    dense_s = (3e-6 + 6e-6) * NUM_LAYERS * tokens
    experts_s = 3e-6 * TOP_K * tokens * NUM_LAYERS
    num_with_tokens = 1.1e-9 * spec.num_parameters
    found = played(blueprint, is_separate=False, num_cores=1)
    assert found.steps_s == pytest.approx([dense_s + experts_s + num_with_tokens] * 3, rel=0.02)
    assert found.bound_s <= found.steps_s[-1] * (1 + 1e-9)
    slow = profile_of(blueprint, is_separate=False, dense_slowdown=Slowdown(alone=2.0, beside=2.0))
    slower = played(blueprint, is_separate=False, num_cores=1, profile=slow)
    assert slower.steps_s[0] - found.steps_s[0] == pytest.approx(dense_s)


def test_the_optimizer_takes_longer_beside_the_next_forward(blueprint: Blueprint) -> None:
    """So long that steps wait for it."""
    fast = profile_of(blueprint, is_separate=True, optimizer_s_per_parameter=1e-6)
    slow = replace(fast, optimizer_slowdown=Slowdown(beside=3.0))
    alone = replace(slow, optimizer_slowdown=Slowdown(alone=3.0, beside=3.0))
    fast_s, slow_s, alone_s = (
        played(blueprint, is_separate=True, profile=each).steps_s[-1] for each in (fast, slow, alone)
    )
    optimizer_s = 1e-6 * blueprint.spec.num_parameters
    assert fast_s < slow_s < alone_s == pytest.approx(fast_s + 2 * optimizer_s, rel=0.1)


@pytest.mark.parametrize("policy", ["affinity", "paper", "mobius", "gpipe-offload"])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("is_tight", [False, True])
def test_every_policy_takes_every_row_once_a_pass_and_comes_to_its_end(
    blueprint: Blueprint, policy: str, num_processes: int, is_tight: bool
) -> None:
    scenario = Scenario(
        blueprint=blueprint,
        profile=profile_of(blueprint, is_separate=True),
        num_processes=num_processes,
        num_cores=2,
        memory_bytes=1 << 30,
        micro_batches=MICRO_BATCHES,
        num_stages=None,
        policy=policy,
    )
    memory_bytes = scenario.memory_bytes
    if is_tight:
        division = scenario.division
        parts = [
            blueprint.part(division.layers_of(rank), stages=division.stages_of(rank) if num_processes > 1 else ())
            for rank in range(num_processes)
        ]
        memory_bytes = max(minimum_bytes(part, MICRO_BATCHES, policy) for part in parts)
    changes: dict[str, Any] = dict(num_processes=num_processes, policy=policy, memory_bytes=memory_bytes)
    found = played(blueprint, is_separate=True, **changes)
    assert found == played(blueprint, is_separate=True, **changes)
    assert len(found.steps_s) == 3 and min(found.steps_s) > 0
    assert (found.cpu_rows_share == 0) == (policy in ("mobius", "gpipe-offload"))
    assert found.bound_s <= min(found.steps_s[1:]) * (1 + 1e-6)
    assert len(found.timelines) == num_processes
    for timeline in found.timelines:
        assert [number for number, _, _ in timeline.steps] == [1, 2, 3]
        for lane in ("accelerator", "h2d", "d2h"):
            spans = [span for span in timeline.spans if span.lane == lane and span.kind != "wait"]
            assert all(before.end_s <= after.start_s + 1e-12 for before, after in pairwise(spans))


@pytest.mark.parametrize("policy", ["affinity", "paper", "mobius"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_flights_load_again_and_take_every_row_once(blueprint: Blueprint, policy: str, num_processes: int) -> None:
    changes: dict[str, Any] = dict(num_processes=num_processes, policy=policy)
    whole = played(blueprint, is_separate=True, **changes)
    for num_in_flight in (2, 1):
        parts = played(blueprint, is_separate=True, micro_batches_in_flight=num_in_flight, **changes)
        assert len(parts.steps_s) == 3
        assert parts.steps_s[-1] > whole.steps_s[-1]
    memory_bytes = max(
        minimum_bytes(scenario_of(blueprint, is_separate=True, **changes).part(rank), 2, policy)
        for rank in range(num_processes)
    )
    changes |= dict(is_separate=True, memory_bytes=memory_bytes)
    assert scenario_of(blueprint, **changes).num_in_flight == 2
    if num_processes == 1 or policy != "affinity":  # else layers may go elsewhere where two must fit
        assert played(blueprint, **changes) == played(blueprint, micro_batches_in_flight=2, **changes)


def test_in_place_flights_take_what_all_at_once_take(blueprint: Blueprint) -> None:
    whole = played(blueprint, is_separate=False, num_cores=1)
    parts = played(blueprint, is_separate=False, num_cores=1, micro_batches_in_flight=1)
    assert parts.steps_s == pytest.approx(whole.steps_s, rel=0.02)


def test_processes_that_share_a_core_take_longer_than_on_their_own(blueprint: Blueprint) -> None:
    seconds = {
        (processes, cores): played(blueprint, is_separate=False, num_processes=processes, num_cores=cores).steps_s[-1]
        for processes, cores in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))
    }
    assert seconds[2, 2] < seconds[2, 1] and seconds[4, 4] < seconds[4, 2]
    # Sharing one core they do together what one would do alone, and send things besides.
    assert seconds[2, 1] > seconds[1, 1]


def test_slower_links_and_less_memory_are_never_faster(blueprint: Blueprint) -> None:
    slow = profile_of(blueprint, is_separate=True, h2d_s_per_byte=1e-7, h2d_duplex_s_per_byte=1e-7)
    for policy in ("mobius", "paper"):
        fast_s = played(blueprint, is_separate=True, policy=policy).steps_s[-1]
        assert played(blueprint, is_separate=True, policy=policy, profile=slow).steps_s[-1] >= fast_s


def test_links_are_said_to_carry_what_a_step_copies(blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in flights, where experts that stay are not loaded again."""
    profile, kept = profile_of(blueprint, is_separate=True), []
    cluster = cluster_of(
        profile,
        blueprint.spec,
        num_tokens=NUM_TOKENS,
        seq_len=NUM_TOKENS,
        memory_bytes=1 << 30,
        num_processes=2,
    )
    asked = Question(
        blueprint=blueprint,
        cluster=cluster,
        micro_batch_size=1,
        micro_batches=MICRO_BATCHES,
        micro_batches_in_flight=1,
        seq_len=NUM_TOKENS,
        num_stages=None,
        policy="mobius",
        popularity=find_popularity("gini=0.4", blueprint.spec),
    )

    def keeping(scenario: Scenario, steps: Sequence[dict[int, list[int]]]) -> Played:
        kept.append(play(scenario, steps, times_decisions=False))
        return kept[-1]

    monkeypatch.setattr(rehearsing, "play", keeping)
    found, _, _ = rehearsing.rehearse(asked, profile, predict(asked))
    assert [link.name for link in found.links] == ["accelerator 0", "accelerator 1"]
    for link, copied in zip(found.links, kept[0].num_bytes, strict=True):
        assert (link.there_bytes, link.back_bytes) == (copied["h2d"] // NUM_STEPS, copied["d2h"] // NUM_STEPS)
        assert link.there_bytes > 0 and link.back_bytes > 0


@pytest.mark.parametrize(("accelerator", "takes_time"), [("emulated", True), ("cuda", False)])
def test_predicting_popularity_takes_the_time_of_the_cpu_that_plays_the_accelerator(
    accelerator: str, takes_time: bool, blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(*arguments: Any, takes_time: bool) -> Guess:
        asked.append(takes_time)
        return Guess(*arguments, takes_time=takes_time)

    monkeypatch.setattr(running, "Guess", noted)
    hardware = replace(profile_of(blueprint, is_separate=True).hardware, accelerator=accelerator)
    profile = profile_of(blueprint, is_separate=True, hardware=hardware)
    played(blueprint, is_separate=True, num_steps=1, times_decisions=True, profile=profile)
    assert asked == [takes_time]
