"""SIGINT and SIGTERM in a run: at once where there is nothing to keep, after the present step where there is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from isthmus.spec.errors import IsthmusError


class Interrupted(IsthmusError):
    """A run was stopped by a signal. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number


class StopSignals:
    """A context that turns SIGINT and SIGTERM into ``Interrupted``; before and after it they do what they did.

    A signal ends the context at once, except inside ``deferred()``: there the first one is only noted in ``requested``,
    for the code inside to act on, and a second one ends the context. Outside the main thread Python delivers no
    signals, and this does nothing.
    """

    def __init__(self, notify: Callable[[str], None] = lambda text: None) -> None:
        """``notify`` is told of a deferred signal, from a thread of its own."""
        self.requested: signal.Signals | None = None
        self._notify = notify
        self._is_deferred = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt) and self.requested is not None:
            raise Interrupted(
                f"stopped at once by {self.requested.name}; a checkpoint that had been written is whole, and --resume "
                "continues from it.",
                self.requested,
            ) from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.requested is None
        self.requested = signal.Signals(number)
        if not (self._is_deferred and is_first):
            # Not Interrupted itself, which somebody's `except ValueError` might take for bad input.
            raise KeyboardInterrupt
        # From another thread, since this one may be in the middle of printing.
        text = f"{self.requested.name}: stopping after this step, with a checkpoint. Once more: at once, without."
        threading.Thread(target=self._notify, args=(text,), daemon=True).start()
