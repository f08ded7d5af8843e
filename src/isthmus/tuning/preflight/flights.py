"""Time of a step whose micro-batches go in flights: each is simulated as a step of its own, of which only the last has
an optimizer. What one flight leaves on an accelerator for the next is not counted, so loads are counted generously."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from isthmus.planning.flights import flight_sizes
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.pipeline import StepResult
from isthmus.simulation.tuning.run import Outcome, Popularity, Simulated, simulate_tuning


def simulate_flights(
    costs: Costs, popularity: Callable[[], Popularity], policy: str, *, num_in_flight: int, num_steps: int
) -> tuple[Outcome, float]:
    """(the policy's steps, skewness of the last). Raises ``IsthmusError`` for what does not fit."""
    sizes = flight_sizes(costs.job.num_micro_batches, num_in_flight)
    last = _simulated(costs, popularity, policy, costs.job.part(sizes[-1]), num_steps)
    outcomes = [(last.outcomes[policy], 1)]
    for size, count in Counter(sizes[:-1]).items():
        # Layers lie where they do in every flight.
        part = costs.job.part(size)
        job = replace(part, has_optimizer=False, num_stages=len(last.outcomes[policy].stages))
        outcomes.append((_simulated(costs, popularity, policy, job, num_steps).outcomes[policy], count))
    return (outcomes[0][0] if len(sizes) == 1 else _together(outcomes)), last.skewness


def _simulated(
    costs: Costs, popularity: Callable[[], Popularity], policy: str, job: TuneJob, num_steps: int
) -> Simulated:
    own = Costs(costs.spec, costs.cluster, job)
    return simulate_tuning(own, popularity, policies=(policy,), num_steps=num_steps)


def _together(outcomes: Sequence[tuple[Outcome, int]]) -> Outcome:
    """Flights one after the other, each so many times."""
    first = outcomes[0][0]
    steps = zip(*(outcome.seconds for outcome, _ in outcomes), strict=True)
    counts = [count for _, count in outcomes]
    bound_s = sum(count * outcome.bound_s for outcome, count in outcomes)
    with_bubbles_s = sum(count * outcome.bound_s * outcome.bubble_factor for outcome, count in outcomes)
    return Outcome(
        policy=first.policy,
        seconds=[sum(count * seconds for count, seconds in zip(counts, step, strict=True)) for step in steps],
        last=_sum([(outcome.last, count) for outcome, count in outcomes if outcome.last is not None]),
        note=first.note,
        stages=first.stages,
        bound_s=bound_s,
        bubble_factor=with_bubbles_s / bound_s if bound_s else 1.0,
    )


def _sum(results: Sequence[tuple[StepResult, int]]) -> StepResult:
    def total(of: Callable[[StepResult], float]) -> float:
        return sum(count * of(result) for result, count in results)

    def by_lane(of: Callable[[StepResult], Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
        devices = range(len(of(results[0][0])))
        lanes = {lane for result, _ in results for counts in of(result) for lane in counts}
        return [
            {lane: total(lambda result, at=device, lane=lane: of(result)[at].get(lane, 0)) for lane in sorted(lanes)}
            for device in devices
        ]

    return StepResult(
        seconds=total(lambda result: result.seconds),
        busy_s=tuple(by_lane(lambda result: result.busy_s)),
        num_bytes=tuple(
            {lane: int(number) for lane, number in device.items()}
            for device in by_lane(lambda result: result.num_bytes)
        ),
        cpu_rows=total(lambda result: result.cpu_rows),
        num_rows=total(lambda result: result.num_rows),
        num_loads=int(total(lambda result: result.num_loads)),
        backlogs=results[0][0].backlogs,
    )
