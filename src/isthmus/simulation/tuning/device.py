"""One device of a simulated pipeline: its accelerator, its process's cores, both directions of its link, and what it
does next.

One micro-batch passes all layers of a stage, then comes the next one: where it is is the device's own state. In forward
a layer is its dense part, then its experts; in backward the experts come first. A layer's experts run on the
accelerator and on the cores at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from isthmus.planning.loading import Phase, unit_key
from isthmus.simulation.tuning.costs import Seat, num_pieces
from isthmus.simulation.tuning.events import CpuPool, Events, Record
from isthmus.simulation.tuning.links import Copy, CopyEngine, Urgency
from isthmus.simulation.tuning.media import Links, Relay
from isthmus.simulation.tuning.policies import StepPolicy
from isthmus.simulation.tuning.weights import Weights
from isthmus.simulation.tuning.work import BACKWARD, Backlog, Division, Run, StepWork
from isthmus.spec.model import DENSE

Leave = Callable[[int, bool, int], None]
NORM_SHARE = 1 / 7
"""Of an optimizer step's seconds: the norm of a layer's gradients reads 4 bytes of its 28."""


class Device:
    """Runs its stages one after the other."""

    __slots__ = (
        "_accelerator",
        "_arrived",
        "_at",
        "_began_s",
        "_costs",
        "_dense_keys",
        "_division",
        "_divisions",
        "_end_norm",
        "_end_s",
        "_events",
        "_is_loading",
        "_is_on_cpu",
        "_is_open",
        "_layer",
        "_leave",
        "_micro_batch",
        "_num_backward",
        "_num_left",
        "_num_there",
        "_policy",
        "_position",
        "_run",
        "_runs",
        "_weights",
        "_work",
        "copy_s",
        "cpu",
        "cpu_rows",
        "loader",
        "num_rows",
        "receiver",
        "record",
        "seat",
        "sender",
        "unloader",
    )

    def __init__(
        self,
        seat: Seat,
        work: StepWork,
        policy: StepPolicy,
        events: Events,
        links: Links,
        record: Record,
        leave: Leave,
        end_norm: Callable[[], None],
        backlog: Backlog,
    ) -> None:
        """``leave(stage, is_backward, micro_batch)`` is called when a micro-batch has left a stage, ``end_norm()``
        when the norm of a layer's gradients is known, where the policy needs it."""
        self.seat = seat
        self.record = record
        self.copy_s = seat.host.accelerator.copy_s
        self.cpu_rows = self.num_rows = 0.0
        self._work, self._policy, self._events, self._leave = work, policy, events, leave
        self._end_norm = end_norm
        self._runs = work.runs[seat.device]
        self._costs = {layer: work.layer_costs(layer) for run in self._runs for layer in run.layers}
        self._accelerator = record.lane("accelerator")
        self.cpu = CpuPool(events, record)
        unstepped = [layer for layer, _ in backlog]
        self._weights = Weights(work, policy, self._runs, events, record.lane("h2d"), links.h2d, unstepped)
        self.loader = self._weights.loader
        self.unloader = CopyEngine(events, record.lane("d2h"), links.d2h)
        # Between accelerators; in no lane that is shown.
        self.receiver, self.sender = Relay(events, links.h2d), Relay(events, links.d2h)
        self._at = -1
        self._arrived: list[deque[int]] = [deque() for _ in self._runs]
        """Micro-batches, by run."""
        self._num_left = 0
        self._is_loading = self._is_open = False
        self._divisions: dict[tuple[int, bool], Division] = {}
        self._num_there: dict[tuple[int, bool], int] = {}
        self._run: Run
        self._division: Division
        self._micro_batch = self._position = self._layer = -1
        """Of the micro-batch that is open, as are ``_run`` and ``_division``."""
        self._began_s = 0.0
        """When the accelerator's experts began to be waited for."""
        self._is_on_cpu = False
        """Whether the layer's experts on the CPU are not done yet."""
        self._end_s: float | None = 0.0
        """When those on the accelerator are, if all of them have landed."""
        self._num_backward: dict[int, int] = {}
        self._dense_keys = {layer: unit_key(layer, DENSE) for layer in self._costs}
        for layer, seconds in backlog:
            self._step(layer, seconds)

    # --- stages ------------------------------------------------------------------------------------------------------

    def enter(self, at: int) -> None:
        """Run ``at`` begins: the device holds its stage and, as the policy will, another."""
        self._at = at
        self._num_left = 0
        self._divisions.clear()
        self._num_there.clear()
        self._weights.enter(at)
        if at >= len(self._runs):
            return
        if self._policy.waits_for_stage and (missing := self._weights.missing()):
            self._is_loading = True
            self._weights.wait(missing, self._loaded)
        self._open()

    def _loaded(self) -> None:
        self._is_loading = False
        self._open()

    def arrive(self, run: int, micro_batch: int) -> None:
        """A micro-batch is here for the run of this number."""
        self._arrived[run].append(micro_batch)
        if run == self._at:
            self._open()

    def check_done(self) -> None:
        """Everything was computed, nothing is left behind: a schedule that stops is a bug, not a result."""
        left = (self._at < len(self._runs), self._is_open, self._weights.awaited, self._weights.unstepped)
        if any(left):
            raise RuntimeError(f"device {self.seat.device} stopped before its end: {left}")

    def _open(self) -> None:
        """The next micro-batch that is here begins the present run."""
        if self._is_open or self._is_loading or not 0 <= self._at < len(self._runs):
            return
        arrived = self._arrived[self._at]
        if arrived:
            self._is_open = True
            self._run, self._micro_batch, self._position = self._runs[self._at], arrived.popleft(), -1
            self._next_layer()

    def _left(self) -> None:
        run = self._run
        self._is_open = False
        self._num_left += 1
        self._leave(run.stage, run.is_backward, self._micro_batch)
        if self._num_left == self._work.num_micro_batches:
            self.enter(self._at + 1)
        else:
            self._open()

    # --- layers ------------------------------------------------------------------------------------------------------

    def _next_layer(self) -> None:
        layers = self._run.layers
        position = self._position = self._position + 1
        if position == len(layers):
            self._left()
            return
        self._layer = layers[position]
        if self._run.is_backward:
            self._begin_experts()
        else:
            self._begin_dense()

    def _begin_dense(self) -> None:
        if self._dense_keys[self._layer] in self.loader.there:
            self._compute_dense()
        else:
            self._weights.wait([self._dense_keys[self._layer]], self._compute_dense)

    def _compute_dense(self) -> None:
        costs, is_backward = self._costs[self._layer], self._run.is_backward
        seconds = costs.dense_s[is_backward]
        if is_backward and self._policy.is_resident and self._is_last_backward(self._layer, count=False):
            seconds += costs.resident_optimizer_s  # the optimizer runs where the weights are
        self._events.at(self._occupy(seconds, "dense"), self._end_layer if is_backward else self._begin_experts)

    def _begin_experts(self) -> None:
        if self._layer not in self._work.tables:
            self._end_experts()
            return
        division = self._division = self._divide()
        self.num_rows += division.num_rows
        self.cpu_rows += division.cpu_rows
        is_on_cpu = self._is_on_cpu = division.cpu_rows > 0
        self._end_s = self._events.now_s
        if is_on_cpu:
            self.unloader.send(self._rows(self._compute_rows, division.down_s, division.down_bytes))
        if division.on:
            self._compute_experts(division)
        elif not is_on_cpu:
            self._end_experts()

    def _end_rows(self) -> None:
        """The CPU's results are back."""
        self._is_on_cpu = False
        if self._end_s is not None and self._end_s > self._events.now_s:
            self._events.at(self._end_s, self._end_experts)
        elif self._end_s is not None:
            self._end_experts()

    def _end_loaded(self, end_s: float) -> None:
        """The accelerator's part will be done at ``end_s``."""
        self._end_s = end_s
        if not self._is_on_cpu:
            self._events.at(end_s, self._end_experts)

    def _end_experts(self) -> None:
        if self._run.is_backward:
            self._begin_dense()
        else:
            self._next_layer()

    def _end_layer(self) -> None:
        """Backward of a layer is over for a micro-batch; after the last one gradients leave."""
        if self._is_last_backward(self._layer, count=True) and not self._policy.is_resident:
            self._unload(self._layer)
        self._next_layer()

    # --- gradients and steps -----------------------------------------------------------------------------------------

    def backlog(self) -> Backlog:
        """What this step leaves to the next."""
        return self._work.steps_after(self.seat.device) if self._policy.overlaps_steps else ()

    def _unload(self, layer: int) -> None:
        """Gradients of the layer's dense part, then of its experts one by one; after the last its optimizer step."""
        costs = self._costs[layer]
        division = self._divisions.get((layer, BACKWARD))
        num = len(division.on) if division else 0
        first_s, expert_s = costs.copy_s + costs.dense_unload_s, costs.copy_s + costs.unload_s
        piece_s = expert_s / num_pieces(costs.expert_bytes, self._policy.piece_bytes) if num else 0.0
        num_bytes = costs.dense_bytes + num * costs.expert_bytes
        copy = Copy(
            first_s + num * expert_s,
            self._end_gradients,
            (layer,),
            "gradient",
            f"gradients L{layer}",
            num_bytes,
            urgency=Urgency.LATER,
            first_s=first_s,
            piece_s=piece_s,
        )
        self.unloader.send(copy)

    def _end_gradients(self, layer: int) -> None:
        """The layer's gradients are on the host."""
        seconds = self._costs[layer].optimizer_s
        if self._policy.overlaps_steps:
            self.cpu.step(layer, NORM_SHARE * seconds, self._end_norm)
        else:
            self._step(layer, seconds)

    def _step(self, layer: int, seconds: float) -> None:
        self.cpu.step(layer, seconds, lambda: self._weights.stepped(layer))

    def _is_last_backward(self, layer: int, *, count: bool) -> bool:
        number = self._num_backward.get(layer, 0) + 1
        if count:
            self._num_backward[layer] = number
        return number == self._work.num_micro_batches

    # --- experts -----------------------------------------------------------------------------------------------------

    def _divide(self) -> Division:
        """Where the layer's experts run for the open micro-batch; queues what is missing."""
        layer, is_backward, policy = self._layer, self._run.is_backward, self._policy
        key = (layer, is_backward)
        known = self._divisions.get(key)
        again = policy.decides_again and not is_backward
        if known is not None and not again:
            return known
        there = self.loader.experts_of(layer)
        if known is not None and self._num_there[key] == len(there):
            return known
        on, urgent = policy.divide(layer, is_backward, [key.expert for key in there])
        division = Division(layer, self._work.tables[layer], on, is_backward)
        self._divisions[key], self._num_there[key] = division, len(there)
        if urgent or again:
            self._weights.want(Phase.EXPERT, self._work.expert_keys(layer, urgent))
            if policy.looks_ahead and not is_backward:
                following = self._run.layers[self._position + 1 : self._position + 2]
                ahead = [at for at in following if at in self._work.tables]
                predicted = [unit_key(at, expert) for at in ahead for expert in policy.predict(at)]
                self._weights.want(Phase.LAYER, predicted)
            self.loader.refill()
        return division

    def _rows(self, then: Callable[[], None], seconds: float, num_bytes: int) -> Copy:
        """Tokens of the CPU's part, on their way there or back."""
        return Copy(seconds, then, (), "tokens", self._name(), num_bytes, self._division.num_cpu_tokens)

    def _compute_rows(self) -> None:
        """The CPU's part is there: its experts, one after the other."""
        division = self._division
        self.cpu.compute(
            division.cpu_s, self._send_back, kind=self._kind(), name=self._name(), num_tokens=division.num_cpu_tokens
        )

    def _send_back(self) -> None:
        self.loader.send(self._rows(self._end_rows, self._division.up_s, self._division.up_bytes))

    def _compute_experts(self, division: Division) -> None:
        """The accelerator's part, in the order of landing."""
        there = self.loader.there
        missing = [] if division.is_there else [key for key in division.keys if key not in there]
        division.is_there = not missing
        if not missing:
            self._end_loaded(self._occupy(division.accelerator_s))
            return
        self._began_s, self._end_s = self._events.now_s, None
        self._weights.wait(missing, self._compute_landed)

    def _compute_landed(self) -> None:
        """All of the accelerator's experts are there; those that landed first were computed meanwhile."""
        division, there, began_s = self._division, self.loader.there, self._began_s
        landings = sorted((there[key], work) for key, work in zip(division.keys, division.work, strict=True))
        end_s = began_s
        for landed_s, work_s in landings:
            end_s = max(end_s, landed_s) + work_s
        start_s = end_s - division.accelerator_s
        self._accelerator.wait(self._name(), began_s, start_s)
        self._accelerator.add(self._kind(), self._name(), start_s, end_s)
        self._end_loaded(max(end_s, self._events.now_s))

    def _occupy(self, seconds: float, kind: str | None = None) -> float:
        """The accelerator is busy until the moment that is returned; with experts if no ``kind`` says else."""
        now_s, lane = self._events.now_s, self._accelerator
        end_s = now_s + seconds
        if lane.spans is None:
            lane.busy_s = lane.busy_s + end_s - now_s
        else:
            name = self._name() if kind is None else f"L{self._layer}"
            lane.add(kind or self._kind(), name, now_s, end_s)
        return end_s

    def _kind(self) -> str:
        return "expert_backward" if self._run.is_backward else "expert_forward"

    def _name(self) -> str:
        """Of a span; where nobody wants to see any, none."""
        return "" if self.record.spans is None else f"L{self._layer} mb{self._micro_batch}"
