"""How a step's micro-batches form *flights*: each goes forward and backward before the next begins, so that only its
activations are kept. Gradients add up over the flights of a step.

Every flight loads weights anew, and a pipeline fills and drains once for every flight. So there are as few as memory
allows, and these are as equal as can be: larger ones would take more memory for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.spec.errors import IsthmusError


def flight_sizes(num_micro_batches: int, most: int) -> list[int]:
    """Micro-batches of each flight, ``most`` or fewer, larger ones first."""
    num_flights = -(-num_micro_batches // most)
    size, num_larger = divmod(num_micro_batches, num_flights)
    return [size + 1] * num_larger + [size] * (num_flights - num_larger)


def largest_flight(num_micro_batches: int, fits: Callable[[int], bool], asked: int | None = None) -> int | None:
    """Micro-batches of the largest flight in a division with as few flights as fit; None where not even the smallest
    does. ``asked``: this many at the most, and not fewer than they need. ``fits(size)`` must hold for all smaller sizes
    too."""
    numbers = range(1, num_micro_batches + 1) if asked is None else (-(-num_micro_batches // asked),)
    sizes = dict.fromkeys(-(-num_micro_batches // num_flights) for num_flights in numbers)
    return next((size for size in sizes if fits(size)), None)


def smallest_flight(num_micro_batches: int, asked: int | None = None) -> int:
    """What must fit in any case."""
    return 1 if asked is None else flight_sizes(num_micro_batches, asked)[0]


def check_in_flight(asked: object, num_micro_batches: int) -> None:
    """Raises ``IsthmusError`` for micro-batches in flight that no step can have. None: as many as fit."""
    if asked is None:
        return
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= num_micro_batches:
        raise IsthmusError(
            f"micro_batches_in_flight: got {asked!r}, wanted a whole number from 1 to {num_micro_batches}, the "
            "micro-batches of a step; leave it out to have as many as fit."
        )
