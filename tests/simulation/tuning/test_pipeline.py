"""A simulated step: tiny schedules computed by hand, and what holds for every one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulation.tuning import tiny

from isthmus.planning.alike import AlikeLayers
from isthmus.simulation.tuning.bound import evenest_s, norm_bound_s, step_bound_s
from isthmus.simulation.tuning.candidates import Make, choose, steady_step
from isthmus.simulation.tuning.clusters import a800
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.device import NORM_SHARE
from isthmus.simulation.tuning.mapping import stages_for
from isthmus.simulation.tuning.pipeline import StepResult, simulate_step
from isthmus.simulation.tuning.policies import (
    Affinity,
    Aptmoe,
    Counts,
    CpuExperts,
    GPipe,
    GPipeOffload,
    Mix,
    Mobius,
    RuntimeAptmoe,
    RuntimeMobius,
    StepPolicy,
)
from isthmus.simulation.tuning.shapes import MOE_SHAPES
from isthmus.simulation.tuning.work import StepWork
from isthmus.spec.timeline import LANES


class Scattered(RuntimeAptmoe):
    """Every other expert on the CPU, whatever it costs."""

    def choose(self, layers: AlikeLayers, is_backward: bool) -> list[frozenset[int]]:
        num_layers, num_experts = layers.counts_LE.shape
        return [frozenset(range(1, num_experts, 2))] * num_layers


class Overlapped(Mobius):
    overlaps_steps = True


def ours(work: StepWork, expected: Counts) -> StepPolicy:
    return Affinity(work, expected, Mix(cpu_weight=1.4, link_price=1.0, least_worth=0.5))


POLICIES: tuple[Make, ...] = (GPipe, GPipeOffload, Mobius, CpuExperts, Aptmoe, Scattered, Overlapped, ours)


def play(work: StepWork, policy: Make, *, keeps_spans: bool = False) -> StepResult:
    return simulate_step(work, policy(work, work.counts), keeps_spans=keeps_spans)


def test_one_layer_is_loaded_computed_and_stepped_in_turn() -> None:
    """Loads 0.5 + 1 + 1; forward 1 + 2 · 5/3; backward three times that; gradients 2.5; 500 parameters stepped."""
    work = tiny.work(tiny.model(), tiny.cluster(), {0: [1.0, 1.0]})
    forward_s = 1 + 10 / 3
    assert play(work, Mobius).seconds == pytest.approx(2.5 + 4 * forward_s + 2.5 + 0.5)
    # Nothing is loaded or unloaded; the accelerator steps, its memory being fast.
    assert play(work, GPipe).seconds == pytest.approx(4 * forward_s, rel=1e-6)


def test_mobius_loads_the_next_stage_while_one_runs_and_offload_after_it() -> None:
    """Two stages of one layer on one device. Forward takes 13/3 s a stage, a load 2.5 s: hidden, or not."""
    work = tiny.work(tiny.model(2), tiny.cluster(), {0: [1.0, 1.0], 1: [1.0, 1.0]}, num_stages=2)
    # The first gradients leave while the other layer's backward runs; the last 2.5 s of them and a step come after.
    end_s = 2 * 3 * 13 / 3 + 2.5 + 0.5
    assert play(work, Mobius).seconds == pytest.approx(2.5 + 2 * 13 / 3 + end_s)
    # Two loads more are waited for: of stage 1 in forward, and of stage 0 again in backward.
    assert play(work, GPipeOffload).seconds == pytest.approx(2.5 + 2 * 13 / 3 + end_s + 2 * 2.5)


def test_what_waits_for_its_own_optimizer_step_gains_nothing_by_overlapping() -> None:
    work = tiny.work(tiny.model(), tiny.cluster(), {0: [1.0, 1.0]})
    first = play(work, Overlapped)
    assert first.backlogs == (((0, 0.5),),)
    # Gradients are waited for, and their norm, a seventh of the step's 0.5 s, which is left to the next forward.
    assert first.seconds == pytest.approx(play(work, Mobius).seconds - 0.5 + 0.5 / 7)
    assert steady_step(work, Overlapped).seconds == pytest.approx(first.seconds + 0.5)


def test_a_layer_is_stepped_before_it_is_loaded_again() -> None:
    """Layer 1 waits 4 s for its step, layer 0 does not; both take 2.5 s to load and 4/3 s · 13 to compute."""
    work = tiny.work(tiny.model(2), tiny.cluster(), {0: [1.0, 1.0], 1: [1.0, 1.0]}, num_stages=2)
    result = simulate_step(work, Overlapped(work, work.counts), backlogs=(((1, 4.0),),), keeps_spans=True)
    loads = [(span.name, span.start_s) for span in result.timelines[0].spans if span.lane == "h2d"]
    assert loads[:4] == [("load L0", 0.0), ("load L0 E0", 0.5), ("load L0 E1", 1.5), ("load L1", 4.0)]
    steps = [span for span in result.timelines[0].spans if span.lane == "optimizer"]
    assert steps[0].name == "L1" and (steps[0].start_s, steps[0].end_s) == (0.0, 4.0)


def test_rule_leaves_an_unpopular_expert_on_the_cpu() -> None:
    """Expert 1 has no tokens, expert 2 one: Equation 1 has 2 s on the CPU against 0.5 + 2 s of loads."""
    work = tiny.work(tiny.model(1, 3), tiny.cluster(), {0: [5.0, 0.0, 1.0]})
    policy = Aptmoe(work, {0: [6.0, 0.0, 0.0]})
    on, urgent = policy.divide(0, False, [])
    assert set(on) == {0} and list(urgent) == [0]
    # What has landed is computed where it is.
    assert set(policy.divide(0, False, [2])[0]) == {0, 2}


def test_cores_are_divided_between_the_processes_of_a_host() -> None:
    spec, counts = tiny.model(2), {0: [1.0, 1.0], 1: [1.0, 1.0]}
    alone = tiny.work(spec, tiny.cluster(1, 2, num_cores=4, memory_bytes_per_s=1e9), counts)
    together = tiny.work(spec, tiny.cluster(2, 1, num_cores=4, memory_bytes_per_s=1e9), counts)
    assert together.tables[0].cpu_s[0][0] == pytest.approx(2 * alone.tables[0].cpu_s[0][0])


def test_accelerators_at_one_root_wait_for_one_another() -> None:
    spec, counts = tiny.model(2), {0: [1.0, 1.0], 1: [1.0, 1.0]}
    apart = play(tiny.work(spec, tiny.cluster(2), counts), Mobius)
    shared = play(tiny.work(spec, tiny.cluster(2, accelerators_per_root=2), counts), Mobius)
    # Both load 2.5 s at once, at half the rate.
    assert shared.seconds >= apart.seconds + 2.5 - 1e-9


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        (GPipeOffload, 2.050947817776717),
        (Mobius, 1.7869563642080746),
        (Aptmoe, 1.8289283370785758),
        (RuntimeAptmoe, 1.7560918531546301),
        (ours, 1.6583012023462675),
    ],
)
def test_schedules_are_what_they_were(policy: Make, seconds: float) -> None:
    """What makes the simulator faster must not change what it says; what makes it truer changes these figures."""
    job = TuneJob(batch=64, seq_len=32, num_micro_batches=4)
    costs = Costs(MOE_SHAPES["S-8"], a800(4), job)
    shares = [2.0**-rank for rank in range(8)]
    counts = {}
    for layer in range(64):
        turned = shares[layer % 8 :] + shares[: layer % 8]
        counts[layer] = [round(4096 * share / sum(shares)) for share in turned]
    step = StepWork(costs, stages_for(costs, 16), costs.order, counts)
    assert steady_step(step, policy).seconds == pytest.approx(seconds, rel=1e-9)


def counts_of(draw: st.DrawFn, num_layers: int, num_experts: int, tokens: int) -> dict[int, list[float]]:
    counts = {}
    for layer in range(num_layers):
        cuts = sorted(draw(st.lists(st.integers(0, 2 * tokens), min_size=num_experts - 1, max_size=num_experts - 1)))
        counts[layer] = [float(b - a) for a, b in pairwise([0, *cuts, 2 * tokens])]
    return counts


@st.composite
def works(draw: st.DrawFn) -> StepWork:
    num_devices = draw(st.integers(1, 3))
    num_layers = draw(st.integers(num_devices, 6))
    num_experts = draw(st.integers(2, 4))
    micro_batches = draw(st.integers(1, 3))
    tokens = micro_batches * draw(st.integers(1, 3))
    hosts = draw(st.sampled_from([(num_devices, 1), (1, num_devices)]))
    root = draw(st.sampled_from([800.0, 1000.0, 4000.0]))
    per_root = draw(st.sampled_from([1, hosts[0]]))
    memory = draw(st.sampled_from([1000.0, 28e3]))
    on = tiny.cluster(*hosts, root_bytes_per_s=root, accelerators_per_root=per_root, memory_bytes_per_s=memory)
    return tiny.work(
        tiny.model(num_layers, num_experts),
        on,
        counts_of(draw, num_layers, num_experts, tokens),
        num_stages=draw(st.integers(num_devices, num_layers)),
        micro_batches=micro_batches,
        batch=tokens,
    )


@settings(max_examples=25)
@given(works(), st.sampled_from(POLICIES))
def test_no_resource_is_used_twice_at_once(work: StepWork, policy: Make) -> None:
    result = play(work, policy, keeps_spans=True)
    for timeline in result.timelines:
        cores = [span for span in timeline.spans if span.lane in ("cpu_experts", "optimizer")]
        for spans in (
            cores,
            *([s for s in timeline.spans if s.lane == lane] for lane in ("accelerator", "h2d", "d2h")),
        ):
            spans = sorted(spans, key=lambda span: (span.start_s, span.end_s))
            assert all(after.start_s >= before.end_s - 1e-9 for before, after in pairwise(spans))
            assert all(
                span.lane in LANES and 0 <= span.start_s <= span.end_s <= result.seconds + 1e-9 for span in spans
            )


@settings(max_examples=25)
@given(works(), st.sampled_from(POLICIES))
def test_work_and_bytes_are_conserved(work: StepWork, policy: Make) -> None:
    results = [play(work, policy, keeps_spans=True)]
    results.append(simulate_step(work, policy(work, work.counts), backlogs=results[0].backlogs, keeps_spans=True))
    for result in results:
        assert result.num_rows == pytest.approx(2 * sum(map(sum, work.counts.values())))
        assert 0 <= result.cpu_rows <= result.num_rows
    num_layers = work.costs.spec.num_layers
    spans = [span for result in results for timeline in result.timelines for span in timeline.spans]
    if policy is GPipe:
        assert not any(span.kind == "gradient" for span in spans) and results[0].num_loads == 0
    if policy is CpuExperts:
        assert all(result.cpu_rows == pytest.approx(result.num_rows) for result in results)
        assert not any(span.kind == "load_expert" for span in spans)
    if policy in (Mobius, GPipeOffload):
        used = sum(bool(count) for counts in work.counts.values() for count in counts)
        gradients = sum(span.num_bytes for span in spans if span.kind == "gradient")
        assert results[0].cpu_rows == 0 and gradients == 2 * (400 * num_layers + 800 * used)
        loaded = sum(span.num_bytes for span in spans if span.kind in ("load_expert", "load_dense")) / 2
        num_units = sum(len(counts) for counts in work.counts.values())
        # Forward loads everything once; backward once more but for what forward has left there.
        assert 400 * num_layers + 800 * num_units <= loaded <= 2 * (400 * num_layers + 800 * num_units)
    # Every layer is stepped once in every step, or is left to the next one, which reads its gradients once more.
    stepped_s = sum(span.end_s - span.start_s for span in spans if span.lane == "optimizer")
    wanted_s = 2 * sum(work.layer_costs(layer).optimizer_s for layer in range(num_layers))
    for backlog in results[1].backlogs:
        stepped_s += sum(seconds for _, seconds in backlog)
    if policy(work, work.counts).overlaps_steps:
        wanted_s *= 1 + NORM_SHARE
    assert stepped_s == pytest.approx(0.0 if policy is GPipe else wanted_s)


@settings(max_examples=10)
@given(works(), st.sampled_from(POLICIES))
def test_the_same_step_has_the_same_schedule(work: StepWork, policy: Make) -> None:
    assert play(work, policy, keeps_spans=True) == play(work, policy, keeps_spans=True)


MIXES = st.builds(
    Mix,
    cpu_weight=st.sampled_from((1.0, 1.4)),
    link_price=st.sampled_from((None, 1.0)),
    least_worth=st.sampled_from((0.0, 1.0)),
    uses_what_is_there=st.booleans(),
)


@settings(max_examples=25)
@given(works(), MIXES, MIXES)
def test_mixes_that_decide_the_same_have_the_same_schedule(work: StepWork, one: Mix, other: Mix) -> None:
    policies = [Affinity(work, work.counts, mix) for mix in (one, other)]
    if policies[0].decisions() == policies[1].decisions():
        results = [simulate_step(work, policy, keeps_spans=True) for policy in policies]
        assert results[0] == results[1]


@settings(max_examples=15)
@given(works())
def test_ours_is_never_slower_than_mobius_or_the_rule_in_our_runtime(work: StepWork) -> None:
    choice = choose(work)
    ours_s = steady_step(work, choice.make).seconds
    assert ours_s == choice.predicted_s
    for policy in (RuntimeMobius, RuntimeAptmoe):
        assert ours_s <= steady_step(work, policy).seconds * (1 + 1e-9)
    again = choose(work, last=choice)
    assert again.stages == choice.stages and again.predicted_s <= ours_s * (1 + 1e-9)


def test_a_step_that_waits_for_the_norm_has_its_optimizer_in_forward() -> None:
    """Two devices of a layer each, two micro-batches, no experts. A micro-batch takes 1 s, and 3 s back."""
    of_layer_s = 0.1, 0.5, 0.5  # stepped, loaded, gradients
    work = tiny.work(tiny.model(2, dense_layers=(0, 1)), tiny.cluster(2), {}, num_stages=2, micro_batches=2, batch=2)
    assert step_bound_s(work) == pytest.approx(2 + 6, rel=1e-3)
    assert norm_bound_s(work) == pytest.approx(2 + 6, rel=1e-3)
    # The first device waits for the second's forward, and for its backward without gradients of weights.
    assert norm_bound_s(work, fills=True) == pytest.approx(2 + 1 + 2 + 6, rel=1e-3)
    assert steady_step(work, Overlapped).seconds > 2 + 1 + 3 + 6 + sum(of_layer_s)
    # Twelve times the optimizer: more than forward on either device, and backward has none of it.
    slow = tiny.cluster(2, memory_bytes_per_s=2 * 28e3 / 24)
    work = tiny.work(tiny.model(2, dense_layers=(0, 1)), slow, {}, num_stages=2, micro_batches=2, batch=2)
    assert step_bound_s(work) == pytest.approx(2 + 6, rel=1e-3)
    assert norm_bound_s(work) == pytest.approx(2.4 + 6, rel=1e-3)


@pytest.mark.parametrize(
    ("accelerator_s", "cpu_s", "seconds"),
    [([], [], 0.0), ([2.0], [2.0], 1.0), ([1.0, 1.0], [9.0, 3.0], 1.5), ([1.0, 0.0], [3.0, 5.0], 0.75)],
)
def test_experts_are_divided_so_that_both_sides_end_together(
    accelerator_s: list[float], cpu_s: list[float], seconds: float
) -> None:
    assert evenest_s(np.array(accelerator_s), np.array(cpu_s)) == pytest.approx(seconds)


@settings(max_examples=15)
@given(works())
def test_no_step_is_faster_than_the_bound(work: StepWork) -> None:
    bounds_s = [step_bound_s(work), norm_bound_s(work), norm_bound_s(work, fills=True)]
    assert all(tighter >= looser * (1 - 1e-3) for looser, tighter in pairwise(bounds_s))
    for policy in (GPipeOffload, Mobius, CpuExperts, Aptmoe):
        assert play(work, policy).seconds >= bounds_s[0] * (1 - 1e-6)
    for policy in (Scattered, Overlapped, RuntimeMobius, RuntimeAptmoe, ours, choose(work).make):
        # A step after another is as all that follow: all its layers' steps are left to it.
        backlogs = play(work, policy).backlogs
        result = simulate_step(work, policy(work, work.counts), backlogs=backlogs)
        assert result.backlogs == backlogs and result.seconds >= max(bounds_s) * (1 - 1e-6)


@settings(max_examples=10)
@given(works(), st.sampled_from((Aptmoe, ours)))
def test_a_plan_for_other_counts_still_computes_everything(work: StepWork, policy: Make) -> None:
    expected = {layer: list(reversed(counts)) for layer, counts in work.counts.items()}
    result = simulate_step(work, policy(work, expected))
    assert result.num_rows == pytest.approx(2 * sum(map(sum, work.counts.values())))
