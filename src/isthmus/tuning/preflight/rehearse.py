"""Time of a step on the machine that was measured: the runtime itself is played through, with its own policies, instead
of the simulator, which describes machines that nobody measured and the pipeline as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from isthmus.reporting.environment import num_cpus_usable
from isthmus.spec.plan import Stage
from isthmus.spec.plan_tune import LinkUse, PredictedStep
from isthmus.spec.profile import Profile
from isthmus.spec.timeline import Timeline
from isthmus.tuning.preflight.predict import RESOURCES, Prediction, Question
from isthmus.tuning.rehearsal.run import NUM_STEPS, WARM_STEPS, Played, play, whole_steps
from isthmus.tuning.rehearsal.scenario import Scenario

NOTE = "the runtime played through with what was measured here"


def rehearse(
    question: Question, profile: Profile, found: Prediction
) -> tuple[Prediction, tuple[Timeline, ...], tuple[Stage, ...]]:
    """``found``, predicted with the simulator, with the step that the runtime would take instead; its timeline by
    process; and the stages. Blocks for seconds. As it is where nothing fits."""
    if not found.fits:
        return found, (), ()
    num_processes = question.cluster.num_accelerators
    scenario = Scenario(
        blueprint=question.blueprint,
        profile=profile,
        num_processes=num_processes,
        num_cores=num_cpus_usable(),
        memory_bytes=question.cluster.hosts[0].accelerator.memory_bytes,
        micro_batches=question.micro_batches,
        num_stages=question.num_stages,
        policy=question.policy,
        micro_batches_in_flight=question.micro_batches_in_flight,
    )
    num_tokens = question.blueprint.num_tokens * question.micro_batches
    played = play(scenario, whole_steps(question.popularity().steps(num_tokens), NUM_STEPS))
    step_s = float(np.median(played.steps_s[WARM_STEPS:]))
    shares = {
        name: float(np.mean([busy[lane] for busy in played.busy_s])) / sum(played.steps_s)
        for lane, name in RESOURCES.items()
    }
    step = PredictedStep(
        step_s=step_s,
        tokens_per_s=question.micro_batch_size * question.micro_batches * question.seq_len / step_s,
        num_stages=len(scenario.division.stages),
        bound_s=played.bound_s,
        bound_share=played.bound_s / step_s,
        busy_shares=shares,
        cpu_pairs_share=played.cpu_rows_share,
        note=NOTE,
    )
    whole = replace(
        found,
        devices=found.devices if scenario.is_separate else (),
        links=_links(found.links, played) if scenario.is_separate else (),
        num_in_flight=scenario.num_in_flight,
        step=step,
        reason="",
    )
    return whole, played.timelines, scenario.division.stages


def _links(found: Sequence[LinkUse], played: Played) -> tuple[LinkUse, ...]:
    """With what was copied in a step as it was played: in flights the simulator loads anew what the runtime still has.
    Of a machine that was measured each process has one, and there are no others."""
    return tuple(
        replace(link, there_bytes=copied["h2d"] // NUM_STEPS, back_bytes=copied["d2h"] // NUM_STEPS)
        for link, copied in zip(found, played.num_bytes, strict=False)
    )
