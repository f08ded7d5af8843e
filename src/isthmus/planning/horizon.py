"""Plans a whole pass at once: which experts of every layer run on the accelerator, and in which order they are loaded.

The link is shared by all layers and can run ahead of compute as far as slots allow (APTMoE's inter-stage phase, section
4.2), so a transfer spent on one layer is missing in another. The plan starts from the Lagrangian: with a price per
second of link time every layer can be decided on its own, minimising its time + price × its link time over how many
of its most popular experts are loaded; the price is bisected. Then greedy moves, evaluated with the recursion of
``pass_model.py``, repair what the price cannot see: the link has nothing to run ahead of in the first layers, and
slots.

Guarantee: all experts on the CPU and all on the accelerator are always among the candidates, so the plan is never
predicted to be slower than either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.planning.pass_model import Choice, PassLayer, PassState, advance, begin, keep
from isthmus.planning.problem import LayerProblem

NUM_PRICE_STEPS = 24
MAX_SWEEPS = 6
MAX_STEPS = 60_000
"""Experts placed by ``advance`` during the greedy moves, which bounds their time (about 1 µs each)."""


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """``on_accelerator``: experts by layer position; ``load_order``: (layer position, expert), soonest first."""

    on_accelerator: tuple[tuple[int, ...], ...]
    load_order: tuple[tuple[int, int], ...]
    link_price: float
    """Seconds a layer must save for a second of link time to be well spent: for ``affinity``."""
    predicted_s: float


def plan_pass(problems: Sequence[LayerProblem], *, num_slots: int, num_waves: int = 1) -> PassPlan:
    """Chooses every layer's most popular experts for the accelerator, for the least makespan of the pass.

    ``problems``: the layers in execution order. ``num_slots`` (2 or more): experts that fit the accelerator, weights
    and gradients together. ``num_waves``: micro-batch groups that alternate between CPU and accelerator. Deterministic.
    Raises ``ValueError`` for fewer than two slots or no wave.
    """
    if num_slots < 2:
        raise ValueError(f"num_slots: got {num_slots}, wanted 2 or more (one expert computes while another lands)")
    if num_waves < 1:
        raise ValueError(f"num_waves: got {num_waves}, wanted 1 or more")
    if not problems:
        return PassPlan(on_accelerator=(), load_order=(), link_price=0.0, predicted_s=0.0)
    kept = keep(list(problems), num_slots)
    layers = [PassLayer(problem, kept=kept[at], position=at) for at, problem in enumerate(problems)]
    search = _Search(layers, num_slots, num_waves)
    search.offer([(0, 0)] * len(layers))
    search.offer([layer.most for layer in layers])
    link_price = search.bisect_price()
    search.improve()
    return PassPlan(
        on_accelerator=tuple(layer.on_accelerator(c) for layer, c in zip(layers, search.best, strict=True)),
        load_order=tuple(
            (position, expert)
            for position, (layer, choice) in enumerate(zip(layers, search.best, strict=True))
            for expert in layer.loads(choice)
        ),
        link_price=link_price,
        predicted_s=search.best_s,
    )


class _Search:
    """The best choices so far, with the states before every layer, so that a move is evaluated from its layer on."""

    def __init__(self, layers: list[PassLayer], num_slots: int, num_waves: int) -> None:
        self.layers = layers
        self.num_slots = num_slots
        self.num_waves = num_waves
        self.best: list[Choice] = []
        self.best_s = float("inf")
        self._states: list[PassState] = []
        steps_s = [layer.problem.optimizer_s for layer in layers]
        self._steps_s = steps_s if any(steps_s) else []
        self._num_steps = 0

    def offer(self, choices: list[Choice]) -> bool:
        """Takes ``choices`` if they are better than the best so far."""
        first = 0
        if self.best and sum(c[0] for c in choices) == sum(c[0] for c in self.best):
            while first < len(choices) and choices[first] == self.best[first]:
                first += 1
            if first == len(choices):
                return False
        state = self._states[first] if first else begin(self.layers, choices, self.num_slots)
        states = self._states[:first]
        for layer, choice in zip(self.layers[first:], choices[first:], strict=True):
            states.append(state)
            state = advance(state, layer, choice, self.num_waves, self._steps_s)
            self._num_steps += 1 + sum(choice)
        if not self.best or state.end_s < self.best_s * (1 - 1e-9):
            self.best, self.best_s, self._states = choices, state.end_s, states
            return True
        return False

    def bisect_price(self) -> float:
        """Offers the Lagrangian's choices for a bisected price; returns the price at which link and layers balance."""
        tables = [ChoiceTable(layer) for layer in self.layers]
        # Above this price no load pays, whatever the layer.
        low, high = 0.0, 1e-9 + max(table.dearest for table in tables)
        for step in range(NUM_PRICE_STEPS):
            price = 0.0 if step == 0 else (low + high) / 2
            choices, time_s, link_s = [], 0.0, 0.0
            for table in tables:
                choice, layer_s, layer_link_s = table.cheapest(price)
                choices.append(choice)
                time_s, link_s = time_s + layer_s, link_s + layer_link_s
            self.offer(choices)
            if link_s > time_s:
                low = price
            elif step == 0:
                return 0.0
            else:
                high = price
        return high

    def improve(self) -> None:
        """Greedy moves until none helps or the step limit is reached."""
        self._num_steps = 0
        for _ in range(MAX_SWEEPS):
            improved = False
            for choices in self._moves():
                if self._num_steps > MAX_STEPS:
                    return
                improved |= self.offer(choices)
            if not improved:
                return

    def _moves(self) -> Iterator[list[Choice]]:
        """One layer a little more or less on the accelerator, or one more here for one less in a layer near by."""
        num = len(self.layers)
        for position in range(num):
            for here, absent in ((0, 1), (0, -1), (0, 2), (0, -2), (1, 0), (-1, 0), (-1, 1), (1, -1)):
                yield from self._moved({position: (here, absent)})
        for distance in (1, 2, 3):
            for position in range(num - distance):
                for sign in (1, -1):
                    yield from self._moved({position: (0, sign), position + distance: (0, -sign)})

    def _moved(self, deltas: dict[int, Choice]) -> Iterator[list[Choice]]:
        choices = list(self.best)
        for position, (here, absent) in deltas.items():
            choices[position] = (choices[position][0] + here, choices[position][1] + absent)
        if all(self.layers[position].allows(choices[position]) for position in deltas):
            yield choices


class ChoiceTable:
    """One layer's seconds and link seconds for every choice (i, k), if what is loaded lands in time."""

    def __init__(self, layer: PassLayer) -> None:
        problem = layer.problem
        here = np.arange(len(layer.here) + 1)[:, None]
        absent = np.arange(len(layer.absent) + 1)[None, :]
        on_tokens = np.array(layer.here_tokens)[:, None] + np.array(layer.absent_tokens)[None, :]
        on_cpu_s = np.array(layer.here_cpu_s)[:, None] + np.array(layer.absent_cpu_s)[None, :]
        on_work_s = np.array(layer.here_work_s)[:, None] + np.array(layer.absent_work_s)[None, :]
        tokens = layer.total_tokens - on_tokens
        travel_s = tokens * (problem.token_d2h_s + problem.token_h2d_s)
        self.layer_s = problem.dense_s + np.maximum(layer.total_cpu_s - on_cpu_s + travel_s, on_work_s)
        up_s = absent * problem.load_s + tokens * problem.token_h2d_s
        down_s = (here + absent) * problem.unload_s + tokens * problem.token_d2h_s
        self.link_s = np.maximum(up_s, down_s)
        self.forbidden = np.where(here + absent > problem.max_on_accelerator, np.inf, 0.0)
        self.dearest = float(layer.total_cpu_s + travel_s.max()) / max(problem.load_s, 1e-12)

    def cheapest(self, price: float) -> tuple[Choice, float, float]:
        """(choice, its seconds, its link seconds) of the least seconds + price × link seconds."""
        cost = self.layer_s + price * self.link_s + self.forbidden
        here, absent = divmod(int(cost.argmin()), cost.shape[1])
        return (here, absent), float(self.layer_s[here, absent]), float(self.link_s[here, absent])
