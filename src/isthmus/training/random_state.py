"""The state of the random numbers that a micro-batch draws: the CPU's generator and, with CUDA, the device's."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_random_state(device: torch.device, seed: int) -> None:
    """The random numbers drawn next depend on ``seed`` alone (from 0, under 2^63).

    ``torch.manual_seed`` sees to every kind of device that there might be, and where one is not in use keeps the call,
    with the stack it came from, for the day that it will be: 0.1 ms each time, and memory that is never given back.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def random_state(device: torch.device) -> list[Tensor]:
    """What ``restore_random_state`` needs. Does not wait for the device: its generator counts on the host."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore_random_state(device: torch.device, states: list[Tensor]) -> None:
    """The random numbers drawn next are those that came after ``random_state`` returned ``states``."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
