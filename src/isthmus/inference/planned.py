"""What a leader leaves open is planned by all devices together: measure or remember, choose, tell everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.inference.profile import measure_cluster
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import Choice, choose
from isthmus.planning.plans import Question
from isthmus.profiling.network import share_texts
from isthmus.spec.inference import STRATEGIES, InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group

_MOST_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a leader asks for: either a ``plan`` or what it is to be made of."""

    schema_version: int = 1
    request: InferenceRequest
    plan: InferencePlan | None = None
    strategies: tuple[str, ...] = STRATEGIES
    codec: str = "fp32"
    dtype: str = "fp32"
    refresh: bool = False
    """Measure devices and links though it was done before."""


def agree_on_plan(
    wish: Wish,
    reader: ShardReader,
    group: Group | None,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> InferencePlan:
    """The plan of the first device's ``wish``, the same on all. Called on all devices, with the leader's wish; blocks
    for about ten seconds where devices have not been measured before. ``tell`` gets what happens.

    Raises ``IsthmusError``, on all devices, where no plan fits.
    """
    if wish.plan is not None:
        return wish.plan
    if group is None or group.world_size == 1:
        return InferencePlan.even("single", 1, codec=wish.codec, dtype=wish.dtype)
    profile = measure_cluster(
        reader,
        group,
        dtypes=(wish.dtype,),
        num_rows=min(_MOST_ROWS, reader.spec.max_num_tokens),
        refresh=wish.refresh,
        is_link_kept=True,
        progress=tell,
    )
    choice = choose(
        Question(
            spec=reader.spec,
            request=wish.request,
            profile=profile,
            strategies=wish.strategies,
            codecs=(wish.codec,),
            dtypes=(wish.dtype,),
        )
    )
    tell(_describe(choice))
    # All have the same profile, but not surely the same arithmetic.
    return from_json(InferencePlan, share_texts(group, to_json(choice.chosen.plan))[0])


def _describe(choice: Choice) -> str:
    plan = choice.chosen.plan
    where = "this device alone" if len(plan.devices) == 1 else f"{plan.strategy} on {len(plan.devices)} devices"
    return f"{where}, about {choice.chosen.latency_s:.2g} s: {choice.reason}"
