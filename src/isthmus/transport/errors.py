"""What can go wrong between devices, as errors that name ranks."""

from __future__ import annotations

from collections.abc import Iterable

from isthmus.spec.errors import IsthmusError


class TransportError(IsthmusError, RuntimeError):
    """The devices of a group do not work together any more. The group can only be closed."""

    exit_code = 3


class RendezvousError(TransportError):
    """The devices did not find each other in time, or do not agree on what they are about to do."""


class EndedError(RendezvousError):
    """Rank 0 has ended in order while others wanted to meet again."""


class MismatchError(TransportError):
    """Two ranks have made different calls, or the same ones in another order."""


class PeerLostError(TransportError):
    """Ranks died, hung up, or sent nothing for the group's time limit."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(sorted(ranks))
        """Who is lost, in the numbering of the group that was connected first (subgroups do not renumber)."""


def rank_names(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 1, 3``."""
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"
