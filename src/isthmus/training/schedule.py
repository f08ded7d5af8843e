"""The learning rate of each step: pure functions, equal to transformers' ``get_*_schedule_with_warmup``."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_at(step: int, *, schedule: str, learning_rate: float, num_steps: int, warmup: float = 0) -> float:
    """The learning rate of the step before which ``step`` steps were taken (from 0; the optimizer's step minus one).

    It rises linearly from 0 over the warmup, then stays (``constant``), or falls to 0 at ``num_steps`` on a straight
    line (``linear``) or half a cosine (``cosine``). ``warmup`` counts steps, or, below 1, is a share of ``num_steps``.
    ``learning_rate`` is the peak. Beyond ``num_steps`` a falling rate is 0. Raises ValueError on wrong settings.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: got {schedule!r}, want one of {', '.join(SCHEDULES)}")
    num_warmup_steps = warmup_steps(warmup, num_steps)
    if step < num_warmup_steps:
        return learning_rate * (step / num_warmup_steps)
    if schedule == "constant":
        return learning_rate
    num_falling_steps = max(1, num_steps - num_warmup_steps)
    if schedule == "linear":
        return learning_rate * max(0.0, (num_steps - step) / num_falling_steps)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - num_warmup_steps) / num_falling_steps)))


def warmup_steps(warmup: float, num_steps: int) -> int:
    """Steps of warmup: ``warmup`` itself, or, below 1, that share of ``num_steps``, rounded up."""
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, want at least 1")
    if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(f"warmup: got {warmup}, want a whole number of steps, or a fraction of all steps below 1")
    return math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
