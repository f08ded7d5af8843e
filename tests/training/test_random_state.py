"""Random numbers are the same again from a seed or a state, and seeding leaves nothing behind."""

from __future__ import annotations

import torch

from isthmus.training.random_state import random_state, restore_random_state, seed_random_state

CPU = torch.device("cpu")


def test_a_seed_and_a_state_give_the_same_numbers_again() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(5)
    torch.rand(3)
    seed_random_state(CPU, 7)
    state = random_state(CPU)
    assert torch.equal(torch.rand(5), wanted)
    restore_random_state(CPU, state)
    assert torch.equal(torch.rand(5), wanted)


def test_seeding_again_and_again_keeps_no_calls_for_devices_that_are_not_there() -> None:
    before = len(torch.cuda._queued_calls)
    seed_random_state(CPU, (1 << 63) - 1)
    assert len(torch.cuda._queued_calls) == before
