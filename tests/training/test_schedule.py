"""Learning-rate schedules equal transformers'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from isthmus.training.schedule import SCHEDULES, learning_rate_at, warmup_steps

PEAK = 3e-4


def transformers_rates(schedule: str, num_steps: int, num_warmup_steps: int, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if schedule == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup_steps)
    else:
        make = get_linear_schedule_with_warmup if schedule == "linear" else get_cosine_schedule_with_warmup
        scheduler = make(optimizer, num_warmup_steps, num_steps)
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@settings(max_examples=40, deadline=None)
@given(schedule=st.sampled_from(SCHEDULES), num_steps=st.integers(1, 40), warmup=st.integers(0, 30))
def test_rates_equal_transformers(schedule: str, num_steps: int, warmup: int) -> None:
    expected = transformers_rates(schedule, num_steps, warmup, num_steps + 1)
    found = [
        learning_rate_at(step, schedule=schedule, learning_rate=PEAK, num_steps=num_steps, warmup=warmup)
        for step in range(num_steps + 1)
    ]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_stays_zero_after_the_end(schedule: str) -> None:
    rates = [learning_rate_at(step, schedule=schedule, learning_rate=1.0, num_steps=10) for step in (10, 11, 25)]
    assert rates == pytest.approx([0.0] * 3, abs=1e-15)


def test_warmup_below_one_is_a_fraction() -> None:
    assert [warmup_steps(warmup, 30) for warmup in (0, 0.05, 0.5, 1, 7)] == [0, 2, 15, 1, 7]
    assert learning_rate_at(5, schedule="constant", learning_rate=1.0, num_steps=100, warmup=0.1) == 0.5


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"schedule": "step", "num_steps": 1}, "schedule: got 'step', want one of constant, linear, cosine"),
        ({"schedule": "linear", "num_steps": 0}, "num_steps: got 0"),
        ({"schedule": "linear", "num_steps": 9, "warmup": -1}, "warmup: got -1"),
        ({"schedule": "linear", "num_steps": 9, "warmup": 2.5}, "warmup: got 2.5"),
    ],
)
def test_wrong_setting_names_the_field(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate_at(0, learning_rate=1.0, **settings_)
