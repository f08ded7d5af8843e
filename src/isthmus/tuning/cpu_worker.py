"""The CPU as a resource of its own: one thread that computes experts and optimizer steps, most urgent first.

PyTorch's operators spread over ``num_threads`` cores inside this thread. ``speed`` below 1 emulates fewer cores for
experts: after each of their tasks the thread idles until the task would have ended on the slower CPU. Optimizer steps,
which memory bandwidth bounds and not cores, are left alone.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from isthmus.reporting.recorder import Recorder


class CpuWorker:
    """Runs tasks one at a time in order of ``(priority, submission)``; lower priorities first. Not re-entrant."""

    def __init__(self, recorder: Recorder, *, num_threads: int, speed: float = 1.0) -> None:
        if not 0.0 < speed <= 1.0:
            raise ValueError(
                f"cpu_speed: got {speed}, wanted a fraction above 0 and at most 1, e.g. 0.25 for a quarter of this CPU."
            )
        self.recorder = recorder
        self.speed = speed
        self.num_threads = num_threads
        self._heap: list[tuple[float, int, Callable[[], Any], Future, tuple[str, str, str, int]]] = []
        self._order = itertools.count()
        self._condition = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="isthmus-cpu", daemon=True)
        self._thread.start()

    def submit(
        self,
        task: Callable[[], Any],
        *,
        priority: float,
        lane: str = "cpu_experts",
        name: str = "",
        kind: str = "",
        num_tokens: int = 0,
    ) -> Future:
        """Queues ``task`` and returns its future at once. Raises ``RuntimeError`` after ``close``."""
        future: Future = Future()
        with self._condition:
            if self._closed:
                raise RuntimeError("the CPU worker is closed")
            heapq.heappush(self._heap, (priority, next(self._order), task, future, (lane, name, kind, num_tokens)))
            self._condition.notify()
        return future

    def _run(self) -> None:
        torch.get_num_threads()  # a new thread's first operator would otherwise undo what is set here
        torch.set_num_threads(self.num_threads)
        torch.set_grad_enabled(False)
        while True:
            with self._condition:
                while not self._heap and not self._closed:
                    self._condition.wait()
                if self._closed:
                    return
                _, _, task, future, (lane, name, kind, num_tokens) = heapq.heappop(self._heap)
            start_s, busy_s = self.recorder.now_s(), time.thread_time()
            try:
                result = task()
            except BaseException as error:
                future.set_exception(error)
            else:
                if self.speed < 1.0 and lane == "cpu_experts":
                    busy_s = time.thread_time() - busy_s
                    time.sleep(max(0.0, start_s + busy_s / self.speed - self.recorder.now_s()))
                future.set_result(result)
            self.recorder.add(lane, name, start_s, self.recorder.now_s(), kind=kind, num_tokens=num_tokens)

    def close(self) -> None:
        """Ends the thread after the task that is running; waiting tasks are cancelled. Idempotent."""
        with self._condition:
            self._closed = True
            for *_, future, _ in self._heap:
                future.cancel()
            self._heap.clear()
            self._condition.notify_all()
        self._thread.join()
