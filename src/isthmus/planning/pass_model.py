"""How long a whole pass takes if every layer computes given experts on the accelerator: links and slots shared by all
layers.

The model, layer by layer in execution order. A layer's dense part runs when the accelerator is free and the CPU
results of the layer before are back. CPU experts start when their tokens are on the host. Loads are served in layer
order, within a layer most work first, each as soon as the link and a slot are free: so they run ahead of compute as
far as slots allow. A slot is free again when its expert has been computed. In backward an accelerator expert takes a
second slot for its gradient, until that has reached the host. Gradients and tokens share the link to the host in the
order they arise.

Work that nothing waits for fills idle time: in backward a share of every expert's seconds (its weight gradients), on
either side; in forward the optimizer's steps of later layers, on the CPU. A step is at most ``STEPS_AHEAD`` layers
ahead of the CPU's experts where there is no idle time for it, and nothing of a layer is loaded or computed before it.

With several waves of micro-batches the CPU works on one wave while the accelerator works on another: a layer's CPU part
starts after its first wave's dense part, and the next layer's dense part after the first wave's CPU results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

from isthmus.planning.problem import LayerProblem

STEPS_AHEAD = 2
"""Optimizer steps of so many layers are done before the CPU computes a layer's experts: loads need a head start."""
Choice = tuple[int, int]
"""(i, k): on the accelerator run the i most popular experts that are there and the k most popular absent ones."""


@dataclass(frozen=True, slots=True)
class PassState:
    """Seconds since the pass began at which each resource is free. ``slots``: a heap of such times."""

    accelerator_s: float
    cpu_s: float
    ready_s: float
    """CPU results of the first wave are back: the next layer may start."""
    returned_s: float
    """CPU results of all waves are back."""
    link_s: float
    d2h_s: float
    slots: tuple[float, ...]
    stepped_s: tuple[float, ...] = ()
    """When the optimizer's step of each layer is done, of those that were begun."""
    cpu_deferred_s: float = 0.0
    """Seconds of work that nothing waits for and idle time has not taken yet; likewise on the accelerator."""
    accelerator_deferred_s: float = 0.0

    @property
    def end_s(self) -> float:
        accelerator_s = self.accelerator_s + self.accelerator_deferred_s
        return max(accelerator_s, self.returned_s, self.cpu_s + self.cpu_deferred_s, self.d2h_s)


class PassLayer:
    """One layer, with running sums over popularity, so that any threshold choice is priced at once."""

    def __init__(self, problem: LayerProblem, *, kept: frozenset[int], position: int = 0) -> None:
        """``kept``: those already there (or on their way) that may keep their slots; others count as absent.
        ``position``: in the pass."""
        self.problem = problem
        self.position = position
        used = [expert for expert, count in enumerate(problem.counts) if count]
        ranked = sorted(used, key=lambda e: (-problem.counts[e], -problem.accelerator_s[e], e))
        self.here = [expert for expert in ranked if expert in kept]
        self.absent = [expert for expert in ranked if expert not in kept]
        self.ready_s = [0.0 if e in problem.resident else problem.arriving_s[e] for e in self.here]
        tokens, cpu_s, work_s = problem.counts, problem.cpu_s, problem.accelerator_s
        self.total_tokens = sum(tokens[e] for e in used)
        self.total_cpu_s = sum(cpu_s[e] for e in used)
        self.here_tokens = [0, *accumulate(tokens[e] for e in self.here)]
        self.absent_tokens = [0, *accumulate(tokens[e] for e in self.absent)]
        self.here_cpu_s = [0.0, *accumulate(cpu_s[e] for e in self.here)]
        self.absent_cpu_s = [0.0, *accumulate(cpu_s[e] for e in self.absent)]
        self.here_work_s = [0.0, *accumulate(work_s[e] for e in self.here)]
        self.absent_work_s = [0.0, *accumulate(work_s[e] for e in self.absent)]

    @property
    def most(self) -> Choice:
        """Everything on the accelerator, as far as ``max_on_accelerator`` allows."""
        num_here = min(len(self.here), self.problem.max_on_accelerator)
        return num_here, min(len(self.absent), self.problem.max_on_accelerator - num_here)

    def allows(self, choice: Choice) -> bool:
        here, absent = choice
        fits = here + absent <= self.problem.max_on_accelerator
        return fits and 0 <= here <= len(self.here) and 0 <= absent <= len(self.absent)

    def on_accelerator(self, choice: Choice) -> tuple[int, ...]:
        return tuple(sorted(self.here[: choice[0]] + self.absent[: choice[1]]))

    def loads(self, choice: Choice) -> list[int]:
        return self.absent[: choice[1]]


def begin(layers: list[PassLayer], choices: list[Choice], num_slots: int) -> PassState:
    """The state before the first layer. What is there and wanted holds its slot until its layer has used it."""
    first = layers[0].problem
    arriving = [second for layer in layers for second in layer.problem.arriving_s.values()]
    num_free = num_slots - sum(choice[0] for choice in choices)
    return PassState(
        accelerator_s=first.accelerator_backlog_s,
        cpu_s=first.cpu_backlog_s,
        ready_s=0.0,
        returned_s=0.0,
        link_s=max([first.link_backlog_s, *arriving]),
        d2h_s=0.0,
        slots=(0.0,) * num_free,
    )


def _step(cpu_s: float, stepped_s: list[float], steps_s: Sequence[float], *, until_s: float, at_least: int) -> float:
    """Optimizer steps in the order of layers, at least so many of them, and as many as can begin before ``until_s``.

    Appends when they are done to ``stepped_s`` and returns when the CPU is free again."""
    while len(stepped_s) < len(steps_s):
        seconds = steps_s[len(stepped_s)]
        if len(stepped_s) >= at_least and cpu_s + seconds / 2 > until_s:
            break
        if seconds:
            cpu_s += seconds
        stepped_s.append(cpu_s if seconds else 0.0)
    return cpu_s


def advance(
    state: PassState, layer: PassLayer, choice: Choice, num_waves: int, steps_s: Sequence[float] = ()
) -> PassState:
    """The state after ``layer`` ran with ``choice``. Both problem and state are left as they are. ``steps_s``:
    optimizer seconds of all layers, if any, of which the states so far have stepped some."""
    problem = layer.problem
    here, absent = choice
    start_s = max(state.accelerator_s, state.ready_s)
    stepped_s, cpu_s = list(state.stepped_s), state.cpu_s
    if steps_s:
        cpu_s = _step(cpu_s, stepped_s, steps_s, until_s=start_s, at_least=layer.position + 1)
        start_s = max(start_s, stepped_s[layer.position])
    accelerator_deferred_s = max(0.0, state.accelerator_deferred_s - (start_s - state.accelerator_s))
    cpu_deferred_s = state.cpu_deferred_s
    tokens = layer.total_tokens - layer.here_tokens[here] - layer.absent_tokens[absent]
    ready_s, returned_s, d2h_s = start_s, start_s, state.d2h_s
    first_s = start_s + problem.dense_s / num_waves
    now = 1.0 - problem.deferrable
    if tokens:
        sent_s = max(d2h_s, first_s) + tokens * problem.token_d2h_s / num_waves
        d2h_s = max(d2h_s, first_s) + tokens * problem.token_d2h_s
        work_s = layer.total_cpu_s - layer.here_cpu_s[here] - layer.absent_cpu_s[absent]
        back_s = tokens * problem.token_h2d_s / num_waves
        if steps_s:
            at_least = layer.position + 1 + STEPS_AHEAD
            cpu_s = _step(cpu_s, stepped_s, steps_s, until_s=sent_s, at_least=at_least)
        begin_s = max(cpu_s, sent_s)
        cpu_deferred_s = max(0.0, cpu_deferred_s - (begin_s - cpu_s)) + problem.deferrable * work_s
        cpu_s = begin_s + now * work_s
        ready_s = begin_s + now * work_s / num_waves + back_s
        returned_s = cpu_s + back_s
    slots, link_s = list(state.slots), state.link_s
    if steps_s:
        link_s = max(link_s, stepped_s[layer.position])
    accelerator_s, link_s, d2h_s = _compute_loaded(
        layer, choice, slots, start_s + problem.dense_s, link_s=link_s, d2h_s=d2h_s
    )
    on_accelerator_s = layer.here_work_s[here] + layer.absent_work_s[absent]
    # The last wave cannot start its share before its own results of the layer before are back.
    work_s = problem.dense_s + now * on_accelerator_s
    accelerator_s = max(accelerator_s, state.returned_s + work_s / num_waves)
    # CPU results use the link too; loads of this layer go first.
    link_s += tokens * problem.token_h2d_s
    return PassState(
        accelerator_s=accelerator_s,
        cpu_s=cpu_s,
        ready_s=ready_s,
        returned_s=returned_s,
        link_s=link_s,
        d2h_s=d2h_s,
        slots=tuple(slots),
        stepped_s=tuple(stepped_s),
        cpu_deferred_s=cpu_deferred_s,
        accelerator_deferred_s=accelerator_deferred_s + problem.deferrable * on_accelerator_s,
    )


def _compute_loaded(
    layer: PassLayer, choice: Choice, slots: list[float], accelerator_s: float, *, link_s: float, d2h_s: float
) -> tuple[float, float, float]:
    """Loads and computes the accelerator's experts one after another. Returns when accelerator, link and the way back
    are free; changes ``slots``."""
    problem, here = layer.problem, choice[0]
    unload_s, work_of = problem.unload_s, problem.accelerator_s
    for position in range(sum(choice)):
        if position < here:
            expert, landed_s = layer.here[position], layer.ready_s[position]
        else:
            expert = layer.absent[position - here]
            link_s = landed_s = max(link_s, heappop(slots)) + problem.load_s
        accelerator_s = max(accelerator_s, landed_s)
        if unload_s:
            accelerator_s = max(accelerator_s, heappop(slots))
        accelerator_s += (1.0 - problem.deferrable) * work_of[expert]
        heappush(slots, accelerator_s)
        if unload_s:
            d2h_s = max(d2h_s, accelerator_s) + unload_s
            heappush(slots, d2h_s)
    return accelerator_s, link_s, d2h_s


def keep(problems: list[LayerProblem], num_slots: int) -> list[frozenset[int]]:
    """Of what is there or on its way, those needed first, so that two slots are left for everything else, per layer."""
    left = max(0, num_slots - 2)
    kept: list[frozenset[int]] = []
    for problem in problems:
        there = [e for e, count in enumerate(problem.counts) if count and not problem.is_absent(e)]
        there.sort(key=lambda e: (-problem.counts[e], e))
        kept.append(frozenset(there[:left]))
        left -= len(kept[-1])
    return kept
