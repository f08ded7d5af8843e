"""How each original layer of a decoupled model is best computed, and in which codec, by dynamic programming."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.block_steps import DECOUPLED, END, START, State, transitions
from isthmus.planning.original_ways import ON_ALL
from isthmus.planning.steps import Step
from isthmus.planning.wire_errors import is_within, squared_error
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import TransformerSpec


@dataclass(frozen=True)
class _Path:
    """One way to come to the end of some layer."""

    seconds: float
    squared: float
    """Of its error (``wire_errors``)."""
    chosen: tuple[State, ...] = ()
    """For each original layer so far."""


class OriginalChoice:
    """How each original layer of a decoupled model is best computed, and in which codec its exchanges are, all else
    being as in ``plan``: exact where seconds of steps depend on no more than the layer before.

    The best ways to end a layer in each state follow from those to end the one before. Under a limit of errors a state
    has several: each faster than all that are as exact.
    """

    def __init__(
        self,
        plan: InferencePlan,
        spec: TransformerSpec,
        request: InferenceRequest,
        seconds_of: Callable[[Sequence[Step]], float],
    ) -> None:
        self._plan, self._spec, self._seconds_of = plan, spec, seconds_of
        self._transitions = transitions(plan.weights, spec, request, overlaps=plan.overlaps)
        self._costs: dict[tuple[State, State], tuple[float, float]] = {}

    def best(
        self, kinds: Sequence[str], codecs: Sequence[str], max_error: float = math.inf
    ) -> tuple[float, InferencePlan] | None:
        """The fastest with one of ``kinds`` and one of ``codecs`` for each original layer whose expected error is at
        most ``max_error``, and the seconds of its layers before it; None where there is none."""
        return self._found(kinds, codecs, max_error, frozenset()).get(0)

    def by_num_whole(
        self, kinds: Sequence[str], codecs: Sequence[str], max_error: float = math.inf
    ) -> dict[int, tuple[float, InferencePlan]]:
        """As ``best``, by the number of original layers of which every device needs all (``ON_ALL``): the more there
        are, the more memory it takes."""
        return self._found(kinds, codecs, max_error, frozenset(ON_ALL))

    def _found(
        self, kinds: Sequence[str], codecs: Sequence[str], max_error: float, counted: frozenset[str]
    ) -> dict[int, tuple[float, InferencePlan]]:
        """As ``best``, by the number of layers that are computed in one of the ways that are ``counted``."""
        spec, plan = self._spec, replace(self._plan, codec=codecs[0])
        choices = [(kind, codec) for kind in kinds for codec in codecs]
        # What is exchanged before the first original layer is in that one's codec.
        paths: dict[tuple[State, int], list[_Path]] = {((START, codec), 0): [_Path(0.0, 0.0)] for codec in codecs}
        is_first = True
        for number in range(spec.num_layers):
            after: dict[tuple[State, int], list[_Path]] = defaultdict(list)
            for (before, count), so_far in paths.items():
                for state in [(DECOUPLED, before[1])] if spec.is_decoupled(number) else choices:
                    if not is_first or state[1] == before[1]:
                        after[state, count + (state[0] in counted)] += self._longer(so_far, before, state)
            is_first = is_first and spec.is_decoupled(number)
            paths = {key: _best_paths(found, max_error) for key, found in after.items()}
        ends: dict[int, list[_Path]] = defaultdict(list)
        for (before, count), so_far in paths.items():
            ends[count] += self._longer(so_far, before, (END, before[1]))
        best = {count: _best_paths(found, max_error)[:1] for count, found in sorted(ends.items())}
        return {count: (path.seconds, _with(plan, path.chosen)) for count, found in best.items() for path in found}

    def _longer(self, paths: Sequence[_Path], before: State, state: State) -> Iterator[_Path]:
        """``paths``, which ended in ``before``, and one layer more."""
        more_s, more = self._cost(before, state)
        for path in paths:
            chosen = path.chosen if state[0] in (DECOUPLED, END) else (*path.chosen, state)
            yield _Path(path.seconds + more_s, path.squared + more, chosen)

    def _cost(self, before: State, state: State) -> tuple[float, float]:
        """Seconds and squared error of a layer after another one; an exchange may follow what the other computed."""
        if (before, state) not in self._costs:
            found = self._transitions.find(before, state)
            more_s = self._seconds_of(found.both) - self._seconds_of(found.before)
            self._costs[before, state] = more_s, squared_error(found.both) - squared_error(found.before)
        return self._costs[before, state]


def _with(plan: InferencePlan, chosen: tuple[State, ...]) -> InferencePlan:
    ways, codecs = zip(*chosen, strict=True) if chosen else ((), ())
    return replace(plan, originals=ways, codecs=codecs)


def _best_paths(paths: Sequence[_Path], max_error: float) -> list[_Path]:
    """Those within ``max_error`` to which no other is both as fast and as exact, fastest first; one, if errors are not
    limited."""
    best: list[_Path] = []
    for path in sorted(paths, key=lambda path: (path.seconds, path.squared, path.chosen)):
        if is_within(path.squared, max_error) and not (best and is_within(best[-1].squared, math.sqrt(path.squared))):
            best.append(path)
    return best[:1] if math.isinf(max_error) else best
