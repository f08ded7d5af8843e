"""A part of a step: micro-batches that go forward and backward before the next ones begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from isthmus.planning.flights import flight_sizes
from isthmus.tuning.data.batches import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Flight:
    """Some of a step's micro-batches, one after the other. What a micro-batch computes depends on its number in the
    step, ``first`` + its place here, and not on the flight."""

    batches: Sequence[MicroBatch]
    first: int = 0
    num_in_step: int
    num_label_tokens: int
    """Of the whole step."""

    @classmethod
    def whole(cls, batches: Sequence[MicroBatch]) -> Flight:
        """Of all."""
        total = sum(batch.num_label_tokens for batch in batches)
        return cls(batches=batches, num_in_step=len(batches), num_label_tokens=total)

    def parts(self, most: int) -> Iterator[Flight]:
        """The flights of a step in their order, of ``most`` micro-batches or fewer."""
        sizes = flight_sizes(len(self.batches), most)
        for first, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            yield Flight(
                batches=self.batches[first : first + size],
                first=first,
                num_in_step=self.num_in_step,
                num_label_tokens=self.num_label_tokens,
            )

    @property
    def is_first(self) -> bool:
        return not self.first

    @property
    def is_last(self) -> bool:
        return self.first + len(self.batches) == self.num_in_step
