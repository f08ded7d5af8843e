"""Work of the computing thread that nothing waits for yet: it fills the time in which the accelerator would wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class DeferredWork:
    """Tasks by layer, done in the order they were added. For the computing thread alone."""

    def __init__(self) -> None:
        self._tasks: deque[tuple[int, Callable[[], object]]] = deque()

    def add(self, layer: int, task: Callable[[], object]) -> None:
        self._tasks.append((layer, task))

    def run_one(self) -> bool:
        """Does the oldest task; False if there is none."""
        if not self._tasks:
            return False
        _, task = self._tasks.popleft()
        task()
        return True

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Does one task after another until ``is_done()`` or nothing is left. Does not wait."""
        while not is_done() and self.run_one():
            pass

    def run_before(self, layer: int) -> None:
        """Does what was added for other layers than ``layer`` before its own: their rows need not be kept any
        longer."""
        while self._tasks and self._tasks[0][0] != layer:
            self.run_one()

    def run_all(self) -> None:
        while self.run_one():
            pass
