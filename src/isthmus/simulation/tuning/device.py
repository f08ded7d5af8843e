"""One device of a simulated pipeline: its accelerator, its process's cores, both directions of its link, and what it
does next.

One micro-batch passes all layers of a stage, then comes the next one. In forward a layer is its dense part, then its
experts; in backward the experts come first. A layer's experts run on the accelerator and on the cores at once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from isthmus.planning.loading import Phase
from isthmus.simulation.tuning.costs import Seat
from isthmus.simulation.tuning.events import CpuPool, Events, Record
from isthmus.simulation.tuning.links import Copy, CopyEngine, Links, Loader, Urgency
from isthmus.simulation.tuning.policies import StepPolicy
from isthmus.simulation.tuning.work import BACKWARD, Backlog, Division, Run, StepWork
from isthmus.spec.model import UnitKey

Leave = Callable[[int, bool, int], None]


class Device:
    """Runs its stages one after the other."""

    def __init__(
        self,
        seat: Seat,
        work: StepWork,
        policy: StepPolicy,
        events: Events,
        links: Links,
        record: Record,
        leave: Leave,
        backlog: Backlog,
    ) -> None:
        """``leave(stage, is_backward, micro_batch)`` is called when a micro-batch has left a stage."""
        self.seat = seat
        self.record = record
        self.copy_s = seat.host.accelerator.copy_s
        self.cpu_rows = self.num_rows = 0.0
        self.num_loads = 0
        self._work, self._policy, self._events, self._leave = work, policy, events, leave
        self._runs = work.runs[seat.device]
        self._at = -1
        self.cpu = CpuPool(events, record)
        window = work.costs.job.copy_window
        self.loader = Loader(events, record, links.h2d, window, self._load_cost, self._landed)
        self.unloader = CopyEngine(events, record, "d2h", links.d2h, window)
        # Between accelerators: they take no copy engine, so they are in no lane.
        self.receiver = CopyEngine(events, Record(False), "h2d", links.h2d, window)
        self.sender = CopyEngine(events, Record(False), "d2h", links.d2h, window)
        self._arrived: dict[tuple[int, bool], list[int]] = {}
        self._num_left = 0
        self._is_loading = self._is_open = False
        self._waiting: dict[UnitKey, list[Callable[[], None]]] = {}
        self._divisions: dict[tuple[int, bool], Division] = {}
        self._num_there: dict[tuple[int, bool], int] = {}
        self._num_halves = 0
        """Of the layer's experts (accelerator, CPU) that are not done yet."""
        self._num_backward: dict[int, int] = {}
        self._load_costs: dict[tuple[int, bool], tuple[float, int, float]] = {}
        self._unstepped = {layer for layers in backlog for layer, _ in layers}
        """Layers whose weights are still those of the step before."""
        if policy.is_resident:
            self.loader.there = dict.fromkeys(self._all_keys(), 0.0)
        for layer, seconds in backlog.steps:
            self._step(layer, seconds)
        for layer, seconds in backlog.gradients:
            self._send_gradients(layer, seconds, 0, 0.0, 0.0)

    # --- stages ------------------------------------------------------------------------------------------------------

    def enter(self, at: int) -> None:
        """Run ``at`` begins: the device holds its stage and, as the policy will, another."""
        self._at = at
        self._num_left = 0
        self._divisions.clear()
        self._num_there.clear()
        if at >= len(self._runs):
            return
        run = self._runs[at]
        if not self._policy.is_resident:
            self.loader.forget({layer for other in self._policy.held(self._runs, at) for layer in other.layers})
            self.loader.queues.clear()
            # Without the dense part nothing begins, whatever was dropped.
            self._queue(Phase.EXPERT, [self._work.dense_key(layer) for layer in run.layers])
            self._queue(Phase.STAGE, self._policy.stage_queue(self._runs, at))
            self.loader.refill()
            if self._policy.waits_for_stage:
                missing = [key for key in self._policy.run_keys(run) if key not in self.loader.there]
                if missing:
                    self._is_loading = True
                    self._wait(missing, self._loaded)
        self._open()

    def _queue(self, phase: Phase, keys: list[UnitKey]) -> None:
        there, on_way, unstepped = self.loader.there, self.loader.on_way, self._unstepped
        missing = [key for key in keys if key not in there and key not in on_way and key.layer not in unstepped]
        self.loader.queues.replace(phase, missing)

    def _loaded(self) -> None:
        self._is_loading = False
        self._open()

    def arrive(self, stage: int, is_backward: bool, micro_batch: int) -> None:
        self._arrived.setdefault((stage, is_backward), []).append(micro_batch)
        self._open()

    def check_done(self) -> None:
        """Everything was computed, nothing is left behind: a schedule that stops is a bug, not a result."""
        left = (self._at < len(self._runs), self._is_open, self._waiting, self._unstepped)
        if any(left):
            raise RuntimeError(f"device {self.seat.device} stopped before its end: {left}")

    def _open(self) -> None:
        """The next micro-batch that is here begins the present run."""
        if self._is_open or self._is_loading or not 0 <= self._at < len(self._runs):
            return
        run = self._runs[self._at]
        arrived = self._arrived.get((run.stage, run.is_backward))
        if arrived:
            self._is_open = True
            self._begin_layer(run, arrived.pop(0), 0)

    def _left(self, run: Run, micro_batch: int) -> None:
        self._is_open = False
        self._num_left += 1
        self._leave(run.stage, run.is_backward, micro_batch)
        if self._num_left == self._work.num_micro_batches:
            self.enter(self._at + 1)
        else:
            self._open()

    # --- layers ------------------------------------------------------------------------------------------------------

    def _begin_layer(self, run: Run, micro_batch: int, position: int) -> None:
        if position == len(run.layers):
            self._left(run, micro_batch)
        elif run.is_backward:
            self._begin_experts(run, micro_batch, position)
        else:
            self._begin_dense(run, micro_batch, position)

    def _begin_dense(self, run: Run, micro_batch: int, position: int) -> None:
        layer = run.layers[position]
        costs = self._work.layer_costs(layer)
        seconds = costs.dense_s[run.is_backward]
        is_last = run.is_backward and self._policy.is_resident and self._is_last_backward(layer, count=False)
        if is_last:  # the optimizer runs where the weights are
            seconds += costs.resident_optimizer_s

        def compute() -> None:
            self._occupy(seconds, "dense", f"L{layer}", lambda: self._end_dense(run, micro_batch, position))

        key = self._work.dense_key(layer)
        if key in self.loader.there:
            compute()
        else:
            self._wait([key], compute)

    def _end_dense(self, run: Run, micro_batch: int, position: int) -> None:
        if run.is_backward:
            self._end_layer(run, micro_batch, position)
        else:
            self._begin_experts(run, micro_batch, position)

    def _begin_experts(self, run: Run, micro_batch: int, position: int) -> None:
        layer = run.layers[position]
        if layer not in self._work.tables:
            self._end_experts(run, micro_batch, position)
            return
        division = self._divide(run, position)
        self._num_halves = bool(division.on) + bool(division.cpu_rows)
        self.num_rows += division.num_rows
        self.cpu_rows += division.cpu_rows
        if not self._num_halves:
            self._end_experts(run, micro_batch, position)
            return
        if division.cpu_rows:
            self._send_rows(run, micro_batch, position, division)
        if division.on:
            self._compute_experts(run, micro_batch, position, division)

    def _end_half(self, run: Run, micro_batch: int, position: int) -> None:
        self._num_halves -= 1
        if not self._num_halves:
            self._end_experts(run, micro_batch, position)

    def _end_experts(self, run: Run, micro_batch: int, position: int) -> None:
        if run.is_backward:
            self._begin_dense(run, micro_batch, position)
        else:
            self._begin_layer(run, micro_batch, position + 1)

    def _end_layer(self, run: Run, micro_batch: int, position: int) -> None:
        """Backward of a layer is over for a micro-batch; after the last one gradients leave."""
        layer = run.layers[position]
        if self._is_last_backward(layer, count=True) and not self._policy.is_resident:
            self._unload(layer)
        self._begin_layer(run, micro_batch, position + 1)

    # --- gradients and steps -----------------------------------------------------------------------------------------

    def backlog(self) -> Backlog:
        """What is left to do at this moment, to the nanosecond: steps that are alike leave the same."""
        gradients = self.unloader.unfinished(Urgency.LATER)
        return Backlog(
            tuple((copy.layer, round(seconds, 9)) for copy, seconds in gradients),
            tuple((layer, round(seconds, 9)) for layer, seconds in self.cpu.unfinished()),
        )

    def _unload(self, layer: int) -> None:
        """Gradients of the layer's dense part, then of its experts one by one; after the last its optimizer step."""
        costs = self._work.layer_costs(layer)
        division = self._divisions.get((layer, BACKWARD))
        num = len(division.on) if division else 0
        first_s, expert_s = costs.copy_s + costs.dense_unload_s, costs.copy_s + costs.unload_s
        piece_s = expert_s / self._num_pieces(costs.expert_bytes) if num else 0.0
        num_bytes = costs.dense_bytes + num * costs.expert_bytes
        self._send_gradients(layer, first_s + num * expert_s, num_bytes, first_s, piece_s)

    def _send_gradients(self, layer: int, seconds: float, num_bytes: int, first_s: float, piece_s: float) -> None:
        copy = Copy(
            seconds,
            lambda: self._step(layer, self._work.layer_costs(layer).optimizer_s),
            "gradient",
            f"gradients L{layer}",
            num_bytes,
            urgency=Urgency.LATER,
            first_s=first_s,
            piece_s=piece_s,
            layer=layer,
        )
        self.unloader.send(copy)

    def _step(self, layer: int, seconds: float) -> None:
        self.cpu.step(layer, seconds, lambda: self._stepped(layer))

    def _stepped(self, layer: int) -> None:
        """New weights may be loaded."""
        if layer not in self._unstepped:
            return
        self._unstepped.discard(layer)
        queues = self.loader.queues
        for key in [key for key in reversed(self._waiting) if key.layer == layer]:
            queues.demand(key)
        if 0 <= self._at < len(self._runs):
            if layer in self._runs[self._at].layers:
                queues.demand(self._work.dense_key(layer))
            self._queue(Phase.STAGE, self._policy.stage_queue(self._runs, self._at))
            self.loader.refill()

    def _is_last_backward(self, layer: int, *, count: bool) -> bool:
        number = self._num_backward.get(layer, 0) + 1
        if count:
            self._num_backward[layer] = number
        return number == self._work.num_micro_batches

    # --- experts -----------------------------------------------------------------------------------------------------

    def _divide(self, run: Run, position: int) -> Division:
        """Where the layer's experts run for the next micro-batch; queues what is missing."""
        layer, is_backward = run.layers[position], run.is_backward
        key = (layer, is_backward)
        known = self._divisions.get(key)
        again = self._policy.decides_again and not is_backward
        if known is not None and not again:
            return known
        loader = self.loader
        there = loader.experts_of(layer)
        if known is not None and self._num_there[key] == len(there):
            return known
        on, urgent = self._policy.divide(layer, is_backward, there)
        division = Division(layer, self._work.tables[layer], on, is_backward)
        self._divisions[key], self._num_there[key] = division, len(there)
        if urgent or again:
            following = run.layers[position + 1] if position + 1 < len(run.layers) else None
            self._queue(Phase.EXPERT, self._work.expert_keys(layer, urgent))
            if self._policy.looks_ahead and not is_backward:
                ahead = () if following not in self._work.tables else self._policy.predict(following)
                keys = [] if following is None else self._work.expert_keys(following, ahead)
                self._queue(Phase.LAYER, keys)
            loader.refill()
        return division

    def _send_rows(self, run: Run, micro_batch: int, position: int, division: Division) -> None:
        """The CPU's part: rows down, its experts one after the other, results back up."""
        layer, rows = run.layers[position], division.cpu_rows
        costs = self._work.layer_costs(layer)
        num_tokens = round(rows)
        kind = "expert_backward" if run.is_backward else "expert_forward"
        name = f"L{layer} mb{micro_batch}"
        down = rows * (2 if run.is_backward else 1)

        def back() -> None:
            copy = Copy(
                costs.copy_s + rows * costs.row_h2d_s,
                lambda: self._end_half(run, micro_batch, position),
                "tokens",
                name,
                round(rows * costs.row_bytes),
                num_tokens,
            )
            self.loader.send(copy)

        def compute() -> None:
            self.cpu.compute(division.cpu_s, back, kind=kind, name=name, num_tokens=num_tokens)

        seconds = costs.copy_s + down * costs.row_d2h_s
        self.unloader.send(Copy(seconds, compute, "tokens", name, round(down * costs.row_bytes), num_tokens))

    def _compute_experts(self, run: Run, micro_batch: int, position: int, division: Division) -> None:
        """The accelerator's part, in the order of landing."""
        layer = run.layers[position]
        there = self.loader.there
        keys = division.keys
        missing = [] if division.is_there else [key for key in keys if key not in there]
        division.is_there = not missing
        kind = "expert_backward" if run.is_backward else "expert_forward"
        name = f"L{layer} mb{micro_batch}"

        def ended() -> None:
            self._end_half(run, micro_batch, position)

        if not missing:
            self._occupy(division.accelerator_s, kind, name, ended)
            return
        began_s = self._events.now_s

        def landed() -> None:
            landings = sorted((there[key], work) for key, work in zip(keys, division.work, strict=True))
            end_s = began_s
            for landed_s, work_s in landings:
                end_s = max(end_s, landed_s) + work_s
            start_s = end_s - division.accelerator_s
            self.record.wait("accelerator", name, began_s, start_s)
            self.record.add("accelerator", kind, name, start_s, end_s)
            self._events.at(max(end_s, self._events.now_s), ended)

        self._wait(missing, landed)

    def _occupy(self, seconds: float, kind: str, name: str, then: Callable[[], None]) -> None:
        now_s = self._events.now_s
        self.record.add("accelerator", kind, name, now_s, now_s + seconds)
        self._events.at(now_s + seconds, then)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _wait(self, keys: list[UnitKey], then: Callable[[], None]) -> None:
        """``then()`` once all of ``keys`` have landed. What is neither there nor on its way is loaded ahead of all."""
        left = len(keys)

        def one() -> None:
            nonlocal left
            left -= 1
            if not left:
                then()

        for key in reversed(keys):
            self._waiting.setdefault(key, []).append(one)
            if key not in self.loader.on_way and key not in self.loader.there and key.layer not in self._unstepped:
                self.loader.queues.demand(key)
        self.loader.refill()

    def _landed(self, key: UnitKey) -> None:
        self.num_loads += 1
        for waiting in self._waiting.pop(key, ()):
            waiting()

    def _load_cost(self, key: UnitKey) -> tuple[float, int, float]:
        layer, is_expert = key.layer, key.expert >= 0
        if (layer, is_expert) not in self._load_costs:
            costs = self._work.layer_costs(layer)
            seconds, num_bytes = costs.dense_load_s, costs.dense_bytes
            if is_expert:
                seconds, num_bytes = costs.load_s, costs.expert_bytes
            self._load_costs[layer, is_expert] = (seconds, num_bytes, seconds / self._num_pieces(num_bytes))
        return self._load_costs[layer, is_expert]

    def _num_pieces(self, num_bytes: int) -> int:
        """In which a unit is copied."""
        piece_bytes = self._policy.piece_bytes
        return ceil(num_bytes / piece_bytes) if piece_bytes else 1

    def _all_keys(self) -> list[UnitKey]:
        layers = {layer for run in self._runs for layer in run.layers}
        keys = [self._work.dense_key(layer) for layer in layers]
        for layer in layers & self._work.tables.keys():
            keys += self._work.expert_keys(layer, range(self._policy.num_experts(layer)))
        return keys
