"""One process of a run on a clock: the order of ``engine`` and ``pipeline/engine``, step after step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.planning.block_seconds import MESSAGE_BYTES_PER_S, MESSAGE_S
from isthmus.planning.flights import flight_sizes
from isthmus.planning.stages import Division
from isthmus.spec.model import OUTER_LAYER, UnitKey
from isthmus.tuning.dense import DenseUnits
from isthmus.tuning.protocols import Policy
from isthmus.tuning.rehearsal.clock import Clock, Happening
from isthmus.tuning.rehearsal.guess import Guess
from isthmus.tuning.rehearsal.waves import BackwardPass, Scene, WavePass
from isthmus.tuning.step_optimizer import StepOptimizer, backward_priority, forward_priority

Decide = Callable[[Callable[[], object]], None]


class Border(NamedTuple):
    """A micro-batch's hidden states before a layer (or its gradients), between two processes."""

    other: int
    layer: int


class Mail:
    """Messages between processes, and where all of them meet."""

    def __init__(self, clock: Clock, num_ranks: int) -> None:
        self.clock = clock
        self.num_ranks = num_ranks
        self._on_way: dict[tuple[int, int, bool], Happening] = {}
        self._num_here = 0
        self._all_here = Happening(clock)

    def message(self, micro_batch: int, layer: int, *, is_gradient: bool) -> Happening:
        """That it has arrived. The same for who sends and who receives it."""
        return self._on_way.setdefault((micro_batch, layer, is_gradient), Happening(self.clock))

    def forget(self, micro_batch: int, layer: int, *, is_gradient: bool) -> None:
        del self._on_way[micro_batch, layer, is_gradient]

    def meet(self) -> None:
        """Blocks until all processes are here."""
        self._num_here += 1
        if self._num_here == self.num_ranks:
            happened, self._all_here, self._num_here = self._all_here, Happening(self.clock), 0
            self.clock.sleep_until(self.clock.now_s + (MESSAGE_S if self.num_ranks > 1 else 0.0))
            happened.happen()
        else:
            self._all_here.wait()


@dataclass(slots=True)
class Group:
    """Micro-batches whose experts run together."""

    numbers: list[int]
    walk: Iterator[int | Border]
    counts: dict[int, list[int]]
    """Rows (E,) of each layer here."""
    waiting: WavePass | None = None
    arrival: Border | None = None
    tape: list[int | tuple[str, Border]] = field(default_factory=list)
    has_loss: bool = False


class Process:
    """One rank. ``num_tokens``: of a micro-batch."""

    def __init__(
        self,
        rank: int,
        division: Division,
        scene: Scene,
        dense: DenseUnits,
        policy: Policy,
        steps: StepOptimizer,
        mail: Mail,
        *,
        num_tokens: int,
        num_micro_batches: int,
        num_in_flight: int,
        decide: Decide,
        guess: Guess,
        num_slots: int,
    ) -> None:
        self.rank, self.division, self.scene, self.mail = rank, division, scene, mail
        self.dense, self.policy, self.steps = dense, policy, steps
        self.num_tokens, self.num_micro_batches = num_tokens, num_micro_batches
        self.flights = flight_sizes(num_micro_batches, num_in_flight)
        self.is_pipelined = division.num_ranks > 1
        self.layers = division.layers_of(rank)
        self.spec = scene.costs.spec
        self.moe_layers = [layer for layer in self.layers if self.spec.layers[layer] is not None]
        self._decide, self._guess = decide, guess
        self.num_slots = num_slots
        self._entered: set[int] = set()
        self._left: dict[int, int] = {}
        self.num_cpu_rows = self.num_rows = 0

    # --- a step ------------------------------------------------------------------------------------------------------

    def train_step(self, number: int, counts_LE: dict[int, list[int]]) -> None:
        """``counts_LE``: rows (E,) of the whole step by layer; those of layers here are looked at."""
        first = 0
        for size in self.flights:
            self._fly(range(first, first + size), counts_LE)
            first += size
        self.steps.begin(number, 1e-5)

    def _fly(self, flight: range, counts_LE: dict[int, list[int]]) -> None:
        is_first, is_last = not flight.start, flight.stop == self.num_micro_batches
        groups = self._groups(flight, counts_LE)
        self._forward(groups)
        self.steps.wait()
        self.mail.meet()  # the loss is rank 0's
        self.steps.begin_backward(is_last=is_last)
        self._expect(groups)
        self.dense.begin_backward(is_first=is_first, is_last=is_last)
        here = {
            layer: [sum(counts) for counts in zip(*(group.counts[layer] for group in groups), strict=True)]
            for layer in self.moe_layers
        }
        self._decide(lambda: self.policy.begin_backward(here, is_last=is_last))
        self._entered = set()
        self._left = dict.fromkeys(self.layers, len(groups))
        self._backward(groups)
        self.scene.deferred.run_all()
        if self.dense.of_layer(OUTER_LAYER):
            self.steps.expect(self.dense.that_leave(OUTER_LAYER))
            self.dense.leave_backward(OUTER_LAYER)

    def _groups(self, flight: range, counts_LE: dict[int, list[int]]) -> list[Group]:
        number = self.num_micro_batches
        num_waves = len(flight) if self.is_pipelined else min(self.policy.num_waves, len(flight))
        groups = []
        for wave in range(num_waves):
            members = list(flight[wave::num_waves])
            counts = {
                layer: [sum(_part(count, at, number) for at in members) for count in counts_LE[layer]]
                for layer in self.moe_layers
            }
            group = Group(numbers=members, walk=iter(()), counts=counts)
            group.walk = self._walk(group)
            groups.append(group)
        return groups

    # --- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, groups: list[Group]) -> None:
        self._entered = set()
        self._left = dict.fromkeys(self.layers, sum(len(group.numbers) for group in groups))
        self._decide(self.policy.begin_forward)
        self.dense.begin_forward()
        if self.dense.of_layer(OUTER_LAYER):
            self._make_ready(OUTER_LAYER)
        while groups:
            active, groups = list(groups), []
            while active:
                for group in self._going_on(active):
                    event = self._go_on(group)
                    if isinstance(event, int):
                        self._start_wave(group, event)
                        continue
                    active.remove(group)
                    if event is not None:
                        group.arrival = event
                        groups.append(group)

    def _go_on(self, group: Group) -> int | Border | None:
        if group.waiting is not None:
            group.waiting.finish()
            group.waiting = None
        elif group.arrival is not None:
            self._receive(group, is_gradient=False)
        return next(group.walk, None)

    def _going_on(self, active: list[Group]) -> list[Group]:
        """As ``Engine`` all, in rounds; as ``PipelineEngine`` the first that need not wait."""
        if not self.is_pipelined:
            return list(active)
        ready = (group for group in active if self._is_ready(group))
        ours = (group for group in active if group.waiting is not None)
        return [next(ready, None) or next(ours, active[0])]

    def _is_ready(self, group: Group) -> bool:
        if group.arrival is None:
            return group.waiting is None or group.waiting.is_ready()
        is_gradient = group.arrival.layer < 0
        return self.mail.message(group.numbers[0], abs(group.arrival.layer), is_gradient=is_gradient).is_done()

    def _walk(self, group: Group) -> Iterator[int | Border]:
        """Yields layers whose experts are to run next, and what has to arrive first."""
        last = self.spec.num_layers
        for stage in self.division.stages_of(self.rank):
            first = stage.first_layer
            source = self.division.rank_of(first - 1) if first else 0
            if source != self.rank:
                border = Border(source, first)
                yield border
                group.tape.append(("received", border))
            for layer in range(first, stage.last_layer + 1):
                yield from self._walk_layer(group, layer)
            after = stage.last_layer + 1
            to = self.division.rank_of(after) if after < last else 0
            if to != self.rank:
                self._send(group, Border(to, after), is_gradient=False)
                group.tape.append(("sent", Border(to, after)))
        if not self.rank:
            owner = self.division.rank_of(last - 1)
            if owner:
                border = Border(owner, last)
                yield border
                group.tape.append(("received", border))
            self._exchange_logits(group)
            seconds = self.scene.costs.outer_s(self.num_tokens, is_backward=False) * len(group.numbers)
            self.scene.compute(seconds, "head", "dense", self.num_tokens)
            group.has_loss = True

    def _walk_layer(self, group: Group, layer: int) -> Iterator[int]:
        if layer not in self._entered:
            self._entered.add(layer)
            self._make_ready(layer)
            self._decide(lambda: self.policy.enter_forward(layer))
        seconds = self.scene.costs.dense_s(self.num_tokens, is_backward=False)
        for _ in group.numbers:
            self.scene.compute(seconds, f"dense L{layer}", "dense", self.num_tokens)
        group.tape.append(layer)
        if layer in group.counts:
            yield layer
        self._left[layer] -= len(group.numbers)
        if not self._left[layer]:
            self.dense.leave_forward(layer)

    def _make_ready(self, layer: int) -> None:
        self.steps.wait_dense(layer)
        self.dense.enter_forward(layer)

    def _start_wave(self, group: Group, layer: int) -> None:
        self.steps.wait_layer(layer)
        counts, found = group.counts[layer], []
        num_tokens = self.num_tokens * len(group.numbers)
        self._guess.expect(group.counts, num_tokens)
        self._decide(lambda: found.append(self.policy.split_forward(layer, counts, None, None)))  # type: ignore[arg-type]
        group.waiting = WavePass(self.scene, layer, counts, num_tokens, found[0], forward_priority(layer))
        self._count(group.waiting)
        group.waiting.start()

    def _count(self, wave: WavePass) -> None:
        self.num_cpu_rows += wave.num_cpu_rows
        self.num_rows += sum(wave.counts_E)

    # --- backward ----------------------------------------------------------------------------------------------------

    def _expect(self, groups: list[Group]) -> None:
        parts = Counter(
            UnitKey(layer, expert)
            for group in groups
            for layer, counts in group.counts.items()
            for expert, count in enumerate(counts)
            if count
        )
        self.scene.gradients.expect(parts)
        self.steps.expect(parts)

    def _backward(self, groups: list[Group]) -> None:
        while groups:
            parts = {id(group): self._backward_part(group) for group in groups}
            active, over = list(groups), object()
            while active:
                for group in self._going_on(active):
                    if next(parts[id(group)], over) is over:
                        active.remove(group)
            groups = [group for group in groups if group.tape]

    def _backward_part(self, group: Group) -> Iterator[None]:
        """To where gradients go to another process."""
        if group.has_loss:
            group.has_loss = False
            seconds = self.scene.costs.outer_s(self.num_tokens, is_backward=True)
            for _ in group.numbers:
                self.scene.compute(seconds, "head backward", "dense", self.num_tokens)
            self._exchange_logits(group)
        while group.tape:
            place = group.tape.pop()
            if isinstance(place, int):
                yield from self._backward_layer(group, place)
                continue
            what, border = place
            if what == "received":
                self._send(group, border, is_gradient=True)
                return
            group.arrival = Border(border.other, -border.layer)
            yield
            self._receive(group, is_gradient=True)

    def _backward_layer(self, group: Group, layer: int) -> Iterator[None]:
        scene = self.scene
        if layer not in self._entered:
            self._entered.add(layer)
            self.dense.enter_backward(layer)
            self._decide(lambda: self.policy.enter_backward(layer))
        if layer in group.counts:
            found = []
            self._decide(lambda: found.append(self.policy.split_backward(layer)))
            num_tokens = self.num_tokens * len(group.numbers)
            priority = backward_priority(layer, self.spec.num_layers)
            work = BackwardPass(scene, layer, group.counts[layer], num_tokens, found[0], priority)
            self._count(work)
            work.start()
            group.waiting = work
            yield
            work.finish()
            group.waiting = None
            scene.deferred.run_before(layer)
        seconds = scene.costs.dense_s(self.num_tokens, is_backward=True) * len(group.numbers)
        scene.compute(seconds, f"dense backward L{layer}", "dense")
        self._left[layer] -= 1
        if not self._left[layer]:
            self.steps.expect(self.dense.that_leave(layer))
            self.dense.leave_backward(layer)
            self._decide(lambda: self.policy.leave_backward(layer))

    # --- messages ----------------------------------------------------------------------------------------------------

    def _message_s(self) -> float:
        num_bytes = 4 * self.num_tokens * self.spec.hidden_size
        return MESSAGE_S + num_bytes / MESSAGE_BYTES_PER_S

    def _send(self, group: Group, border: Border, *, is_gradient: bool) -> None:
        for number in group.numbers:
            self.scene.cores.work(self._message_s())
            self.mail.message(number, border.layer, is_gradient=is_gradient).happen()

    def _receive(self, group: Group, *, is_gradient: bool) -> None:
        border, group.arrival = group.arrival, None
        assert border is not None
        scene, start_s = self.scene, self.scene.recorder.now_s()
        for number in group.numbers:
            self.mail.message(number, abs(border.layer), is_gradient=is_gradient).wait()
            self.mail.forget(number, abs(border.layer), is_gradient=is_gradient)
        name = f"L{abs(border.layer)}"
        scene.recorder.add("accelerator", name, start_s, scene.recorder.now_s(), kind="wait")
        scene.compute(self._message_s() * len(group.numbers), name, "message")

    def _exchange_logits(self, group: Group) -> None:
        """Router logits of other processes' layers, and their gradients: one message from each of these."""
        others = {self.division.rank_of(layer) for layer in self.spec.moe_layers} - {self.rank}
        self.scene.cores.work(MESSAGE_S * len(others) * len(group.numbers))


def _part(count: int, at: int, number: int) -> int:
    """Of ``count`` rows those of micro-batch ``at`` of ``number``: as equal parts as can be."""
    return count * (at + 1) // number - count * at // number


def steps_of(process: Process, counts: Sequence[dict[int, list[int]]], after: Callable[[], None]) -> Iterator[float]:
    """Seconds of one step after the other. ``after``: what belongs to a step's end."""
    for number, counts_LE in enumerate(counts, start=1):
        start_s = process.scene.recorder.now_s()
        process.train_step(number, counts_LE)
        after()
        process.mail.meet()  # what happened in the step
        end_s = process.scene.recorder.now_s()
        process.scene.recorder.step(number, start_s, end_s)
        yield end_s - start_s
