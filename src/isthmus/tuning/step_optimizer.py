"""When optimizer steps run: on the CPU, layer by layer in the order in which the next forward pass needs them.

Clipping by the global norm needs every gradient first, so the step cannot start inside the backward pass. It overlaps
the next forward pass instead: layer l's weights need only be new when layer l is loaded or computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from isthmus.planning.pass_model import STEPS_AHEAD
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import OUTER_LAYER, UnitKey
from isthmus.tuning.cpu_worker import CpuWorker
from isthmus.tuning.optimizer import StoreOptimizer

EXPERTS_AT_ONCE = 4
"""Experts that one task steps: few enough that more urgent work need not wait long, enough to spread over the cores."""
SHORTEST_WAIT_S = 50e-6
NORM_PRIORITY = 1e6
"""Norms of gradients wait behind experts' backward, which the accelerator waits for."""


class StepOptimizer:
    """Runs ``StoreOptimizer`` on the CPU worker, or in place where there is none.

    ``on_step()`` is called before the first weight changes, ``on_dense_stepped(layer)`` when a layer's weights apart
    from its routed experts are new, ``on_layer_stepped(layer)`` when all are (from the worker's thread, if there is
    one).
    """

    def __init__(
        self,
        optimizer: StoreOptimizer,
        keys: Iterable[UnitKey],
        worker: CpuWorker | None,
        recorder: Recorder,
        on_step: Callable[[], None],
        on_dense_stepped: Callable[[int], None],
        on_layer_stepped: Callable[[int], None],
        condition: threading.Condition | None = None,
    ) -> None:
        """``condition``: what waits and locks, for a rehearsal on a clock."""
        self.optimizer = optimizer
        self.worker = worker
        self._recorder = recorder
        self.on_step = on_step
        self.on_dense_stepped = on_dense_stepped
        self.on_layer_stepped = on_layer_stepped
        self._layers: dict[int, list[UnitKey]] = {}
        for key in sorted(keys):
            self._layers.setdefault(key.layer, []).append(key)
        self._condition = condition or threading.Condition()
        self._expected: set[UnitKey] = set()
        self._norms: list[Future] = []
        self._dense_steps: dict[int, Future] = {}
        self._steps: dict[int, Future] = {}
        self._is_stepping = False
        self._is_last = True
        """Whether the present backward pass is the step's last: gradients are whole when it adds to them."""

    def begin_backward(self, *, is_last: bool) -> None:
        """A backward pass of the step begins. Blocks until the gradients of those before it lie in the store: this one
        adds to them. ``is_last``: norms are computed as gradients come in, since nothing more will be added."""
        self._await_gradients()
        self._is_last = is_last

    def discard(self) -> None:
        """Forgets the gradients of the step's passes so far, once they have come in. Blocks."""
        self._await_gradients()
        self.optimizer.discard_gradients()

    def _await_gradients(self) -> None:
        recorder, start_s = self._recorder, self._recorder.now_s()
        with self._condition:
            while self._expected:
                if not self._condition.wait(timeout=300.0):
                    raise RuntimeError(f"gradients of {sorted(self._expected)[:4]} … did not arrive within 300 s")
        for norm in self._norms:
            norm.result()
        self._norms.clear()
        recorder.add("accelerator", "gradients on their way to the host", start_s, recorder.now_s(), kind="wait")

    def expect(self, keys: Iterable[UnitKey]) -> None:
        """These units will get a gradient in this pass; ``complete`` must be called for each."""
        with self._condition:
            self._expected.update(keys)

    def complete(self, key: UnitKey) -> None:
        """All that this pass adds to the unit's gradient lies in the store. From any thread."""
        if not self._is_last:
            pass
        elif self.worker is None:
            self.optimizer.finish_gradient(key)
        else:
            norm = self.worker.submit(
                lambda: self.optimizer.finish_gradient(key),
                priority=NORM_PRIORITY,
                lane="optimizer",
                name="norm",
                kind="norm",
            )
            self._norms.append(norm)
        with self._condition:
            self._expected.discard(key)
            self._condition.notify_all()

    def begin(self, step: int, learning_rate: float) -> float:
        """Waits for all gradients, fixes the clip coefficient and starts the steps. Returns the global gradient norm.

        Raises ``NonFiniteGradient`` before anything is changed.
        """
        self._await_gradients()
        norm = self.optimizer.begin_step(step, learning_rate)
        self._is_stepping = True
        self.on_step()
        for layer in sorted(self._layers):
            self._start(layer)
        return norm

    def _start(self, layer: int) -> None:
        keys = self._layers[layer]
        dense = [key for key in keys if not key.is_expert]
        experts = [key for key in keys if key.is_expert]
        parts = [experts[start : start + EXPERTS_AT_ONCE] for start in range(0, len(experts), EXPERTS_AT_ONCE)]
        self._dense_steps[layer] = self._run(layer, dense, self.on_dense_stepped)
        for part in parts[:-1]:
            self._run(layer, part)
        self._steps[layer] = self._run(layer, parts[-1] if parts else [], self.on_layer_stepped)

    def _run(self, layer: int, keys: list[UnitKey], on_stepped: Callable[[int], None] | None = None) -> Future:
        def task() -> None:
            self.optimizer.step_units(keys)
            if on_stepped is not None:
                on_stepped(layer)

        if self.worker is not None:
            priority = forward_priority(layer) - 0.5 - STEPS_AHEAD
            return self.worker.submit(
                task, priority=priority, lane="optimizer", name=f"AdamW L{layer}", kind="optimizer"
            )
        done: Future = Future()
        task()
        done.set_result(None)
        return done

    def wait_dense(self, layer: int) -> None:
        """Blocks until the layer's weights apart from its routed experts are new. Raises what their step raised."""
        self._join(self._dense_steps.pop(layer, None), layer)

    def wait_layer(self, layer: int) -> None:
        """Blocks until all of the layer's weights are new. Raises what their step raised."""
        self.wait_dense(layer)
        self._join(self._steps.pop(layer, None), layer)

    def _join(self, step: Future | None, layer: int) -> None:
        if step is None:
            return
        start_s = self._recorder.now_s()
        step.result()
        end_s = self._recorder.now_s()
        if end_s - start_s > SHORTEST_WAIT_S:
            self._recorder.add("accelerator", f"AdamW L{layer}", start_s, end_s, kind="wait")

    def wait(self) -> None:
        """Blocks until all weights are new, and closes the step, if one is under way."""
        for layer in list(self._steps):
            self.wait_layer(layer)
        if self._is_stepping:
            self.optimizer.end_step()
            self._is_stepping = False


def forward_priority(layer: int) -> float:
    """Urgency of CPU work in the forward pass: earlier layers first. A layer's optimizer step comes just before its
    experts."""
    return float(layer - OUTER_LAYER)


def backward_priority(layer: int, num_layers: int) -> float:
    """As ``forward_priority`` for the backward pass: later layers first, all of them after the forward pass."""
    return float(2 * num_layers - layer + 1)
