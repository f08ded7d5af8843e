"""The routed experts of one layer for one wave, on a clock: what ``forward_pass``, ``backward_pass`` and ``cpu_part``
do, in their order, without the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from isthmus.planning.block_seconds import Costs
from isthmus.planning.problem import BYTES_PER_VALUE, WEIGHT_GRADIENT_SHARE
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.deferred import DeferredWork
from isthmus.tuning.gradients import GradientSink
from isthmus.tuning.protocols import Loader
from isthmus.tuning.rehearsal.clock import Clock, Cores, Happening
from isthmus.tuning.rehearsal.machine import ClockAccelerator, ClockRecorder, ClockWorker


@dataclass(slots=True)
class Scene:
    """What the waves of a process work with. ``worker`` None: there is no separate memory, all is computed in place."""

    clock: Clock
    cores: Cores
    """Of the process."""
    device: Cores
    """What the accelerator computes with: the same where a CPU plays it."""
    recorder: ClockRecorder
    accelerator: ClockAccelerator
    worker: ClockWorker | None
    loader: Loader
    gradients: GradientSink
    deferred: DeferredWork
    costs: Costs
    num_threads: int
    num_cpu_threads: int

    def compute(self, seconds: float, name: str, kind: str, num_tokens: int = 0) -> None:
        """On the accelerator, for which the computing thread waits."""
        profile = self.costs.profile
        slowdown = profile.accelerator_slowdown if kind.startswith("expert") else profile.dense_slowdown
        with self.recorder.span("accelerator", name, kind=kind, num_tokens=num_tokens):
            self.device.work(seconds, self.num_threads, slowdown)

    def compute_on_cpu(self, seconds: float) -> None:
        """Experts, by the CPU worker."""
        self.cores.work(seconds, self.num_cpu_threads, self.costs.profile.cpu_slowdown)


class _Trip:
    """The CPU's part: rows down, its task, results back up."""

    def __init__(self, scene: Scene, name: str, priority: float) -> None:
        self.scene, self.name, self.priority = scene, name, priority
        self._done: Happening | None = None
        self._landed: Happening | None = None

    def start(
        self,
        down_bytes: Sequence[int],
        up_bytes: Sequence[int],
        task: Callable[[], None],
        *,
        kind: str,
        num_tokens: int,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        scene, done = self.scene, Happening(self.scene.clock)
        assert scene.worker is not None
        worker = scene.worker
        self._done = done

        def run() -> None:
            task()
            for size in up_bytes:
                self._landed = scene.accelerator.transfer(
                    size, "h2d", name=f"{self.name} results", kind="tokens", is_urgent=True
                )
            then()
            done.happen()

        def submit() -> None:
            worker.submit(run, priority=self.priority, name=self.name, kind=kind, num_tokens=num_tokens)

        for number, size in enumerate(down_bytes, start=1):
            scene.accelerator.transfer(
                size,
                "d2h",
                name=f"{self.name} tokens",
                kind="tokens",
                is_urgent=True,
                on_done=submit if number == len(down_bytes) else None,
            )

    def is_done(self) -> bool:
        return self._done is None or self._done.is_done()

    def join(self) -> None:
        if self._done is None:
            return
        scene = self.scene
        scene.deferred.run_until(self._done.is_done)
        start_s = scene.recorder.now_s()
        self._done.wait()
        scene.recorder.add("accelerator", f"{self.name}: CPU experts", start_s, scene.recorder.now_s(), kind="wait")
        assert self._landed is not None
        scene.accelerator.wait_for(self._landed)
        self._done = None


class WavePass:
    """Forward or backward of one wave at one layer. ``counts_E``: its rows by expert; ``num_tokens``: its tokens."""

    is_backward = False
    kind = "expert_forward"

    def __init__(
        self, scene: Scene, layer: int, counts_E: Sequence[int], num_tokens: int, split: LayerSplit, priority: float
    ) -> None:
        self.scene, self.layer, self.counts_E = scene, layer, counts_E
        self.name = f"L{layer}"
        self.priority = priority
        self.on_cpu = [expert for expert in split.on_cpu if counts_E[expert]]
        self.on_accelerator = [expert for expert in split.on_accelerator if counts_E[expert]]
        self.routing_s = scene.costs.routing_s(layer, num_tokens, is_backward=self.is_backward)
        self.trip = _Trip(scene, self.name, priority)
        self._late: list[int] = []

    def key(self, expert: int) -> UnitKey:
        return UnitKey(self.layer, expert)

    @property
    def num_cpu_rows(self) -> int:
        return sum(self.counts_E[expert] for expert in self.on_cpu)

    @property
    def row_bytes(self) -> int:
        expert = self.scene.costs.spec.layers[self.layer]
        assert expert is not None
        return expert.hidden_size * BYTES_PER_VALUE[self.scene.costs.profile.dtype]

    def seconds(self, experts: Iterable[int], *, on_cpu: bool) -> list[float]:
        rows = [self.counts_E[expert] for expert in experts]
        return self.scene.costs.experts_s(self.layer, rows, is_backward=self.is_backward, on_cpu=on_cpu)

    def start(self) -> None:
        scene = self.scene
        scene.compute(self.routing_s / 2, self.name, "routing")
        if self.on_cpu:
            self.send()
        ready = [expert for expert in self.on_accelerator if scene.loader.is_resident(self.key(expert))]
        self.compute(ready)
        self._late = [expert for expert in self.on_accelerator if expert not in set(ready)]

    def is_ready(self) -> bool:
        """Whether all that ``finish`` needs is there."""
        is_resident = self.scene.loader.is_resident
        return self.trip.is_done() and all(is_resident(self.key(expert)) for expert in self._late)

    def finish(self) -> None:
        for expert in self._late:
            self.await_late(expert)
            self.compute([expert])
        self.trip.join()
        self.scene.compute(self.routing_s / 2, self.name, "routing")

    def await_late(self, expert: int) -> None: ...

    def send(self) -> None:
        rows, seconds = self.num_cpu_rows, sum(self.seconds(self.on_cpu, on_cpu=True))
        scene = self.scene
        self.trip.start(
            [4 * rows, rows * self.row_bytes],
            [rows * self.row_bytes],
            lambda: scene.compute_on_cpu(seconds),
            kind=self.kind,
            num_tokens=rows,
        )

    def compute(self, experts: Sequence[int]) -> None:
        if not experts:
            return
        scene, keys = self.scene, [self.key(expert) for expert in experts]
        for key in keys:
            scene.loader.acquire(key)
        rows = sum(self.counts_E[expert] for expert in experts)
        scene.compute(sum(self.seconds(experts, on_cpu=False)), self.name, self.kind, rows)
        scene.loader.release(*keys)


class BackwardPass(WavePass):
    """Gradients of inputs at once, those of weights when a side has nothing more urgent to do."""

    is_backward = True
    kind = "expert_backward"

    def await_late(self, expert: int) -> None:
        scene = self.scene
        scene.deferred.run_until(lambda: scene.loader.is_resident(self.key(expert)))

    def send(self) -> None:
        rows, seconds = self.num_cpu_rows, self.seconds(self.on_cpu, on_cpu=True)
        scene = self.scene
        worker = scene.worker
        assert worker is not None

        def weight_gradient(expert: int, seconds: float) -> None:
            scene.gradients.open(self.key(expert), on_cpu=True)
            scene.compute_on_cpu(WEIGHT_GRADIENT_SHARE * seconds)
            scene.gradients.close(self.key(expert))

        def defer() -> None:
            for expert, one_s in zip(self.on_cpu, seconds, strict=True):
                worker.submit(
                    lambda expert=expert, one_s=one_s: weight_gradient(expert, one_s),
                    priority=self.priority + 1.5,
                    name=f"{self.name} weights",
                    kind=self.kind,
                    num_tokens=self.counts_E[expert],
                )

        self.trip.start(
            [4 * rows, rows * self.row_bytes, rows * self.row_bytes],
            [rows * self.row_bytes, 4 * rows],
            lambda: scene.compute_on_cpu((1 - WEIGHT_GRADIENT_SHARE) * sum(seconds)),
            kind=self.kind,
            num_tokens=rows,
            then=defer,
        )

    def compute(self, experts: Sequence[int]) -> None:
        if not experts:
            return
        scene, keys = self.scene, [self.key(expert) for expert in experts]
        seconds = self.seconds(experts, on_cpu=False)
        rows = sum(self.counts_E[expert] for expert in experts)
        in_place = scene.worker is None
        now = 1.0 if in_place else 1 - WEIGHT_GRADIENT_SHARE
        for key in keys:
            scene.loader.acquire(key)
            if in_place:
                scene.gradients.open(key, on_cpu=False)
        scene.compute(now * sum(seconds), self.name, self.kind, rows)
        scene.loader.release(*keys)
        for expert, one_s in zip(experts, seconds, strict=True):
            if in_place:
                scene.gradients.close(self.key(expert))
            else:
                later = WEIGHT_GRADIENT_SHARE * one_s
                scene.deferred.add(self.layer, lambda expert=expert, later=later: self._weight_gradient(expert, later))

    def _weight_gradient(self, expert: int, seconds: float) -> None:
        self.scene.gradients.open(self.key(expert), on_cpu=False)
        self.scene.compute(seconds, self.name, self.kind, self.counts_E[expert])
        self.scene.gradients.close(self.key(expert))
