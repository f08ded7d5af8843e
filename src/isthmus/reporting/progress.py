"""Owns the live account of a training run: a panel that redraws itself in a terminal, one line per step
elsewhere."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from isthmus.reporting.human import human_memory, human_s

_PLAIN_EVERY_S = 2.0
_PLAIN_PHASE_EVERY_S = 10.0


class View(Protocol):
    """What a step shows."""

    @property
    def step(self) -> int:
        """Steps done so far, this one included: ``num_steps`` at the end."""
        ...

    def parts(self) -> list[str]:
        """For a line."""
        ...

    def rows(self, evaluated: str) -> list[tuple[RenderableType, ...]]:
        """For the panel: name, value, name, value. ``evaluated`` is the latest evaluation."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a step shows. Shares are fractions: of the step's time (``copy_engine_use``), of the bound
    (``bound_share``)."""

    step: int
    """Steps done so far, this one included: ``num_steps`` at the end."""
    loss: float
    learning_rate: float
    tokens_per_s: float
    num_experts_on_cpu: int
    num_experts_on_accelerator: int
    copy_engine_use: float
    bound_share: float
    accelerator_bytes: int
    accelerator_budget_bytes: int

    def parts(self) -> list[str]:
        return [
            f"loss {self.loss:.4f}",
            f"lr {self.learning_rate:.2e}",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"experts {self.num_experts_on_cpu} CPU / {self.num_experts_on_accelerator} accelerator",
            f"copies {self.copy_engine_use:.0%}",
            f"bound {self.bound_share:.0%}",
            f"memory {_memory(self)}",
        ]

    def rows(self, evaluated: str) -> list[tuple[RenderableType, ...]]:
        experts = f"{self.num_experts_on_cpu} CPU · {self.num_experts_on_accelerator} accelerator"
        loss, speed = Text(f"{self.loss:.4f}", style="bold"), Text(f"{self.tokens_per_s:,.0f}", style="bold")
        return [
            ("loss", loss, "tokens/s", speed),
            ("evaluation", evaluated, "of the bound", _gauge(self.bound_share)),
            ("learning rate", f"{self.learning_rate:.2e}", "copy engine", _gauge(self.copy_engine_use)),
            ("experts", experts, "memory", _memory(self)),
        ]


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """A step of a run that has no experts and no links to tell of."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_s: float

    def parts(self) -> list[str]:
        return [f"loss {self.loss:.4f}", f"lr {self.learning_rate:.2e}", f"{self.tokens_per_s:,.0f} tokens/s"]

    def rows(self, evaluated: str) -> list[tuple[RenderableType, ...]]:
        loss, speed = Text(f"{self.loss:.4f}", style="bold"), Text(f"{self.tokens_per_s:,.0f}", style="bold")
        return [
            ("loss", loss, "tokens/s", speed),
            ("evaluation", evaluated, "learning rate", f"{self.learning_rate:.2e}"),
        ]


class TrainingProgress:
    """A context in which a run tells what it does. One thread at a time; no call blocks on anything but the console.

    ``plain`` None decides by itself: lines when ``console`` is no terminal, or a dumb one, or ``CI`` is set; otherwise
    live. In plain form steps come at most every two seconds, but the first and the last always, as do phases and
    evaluations.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        title: str = "isthmus tune",
        console: Console | None = None,
        plain: bool | None = None,
    ) -> None:
        self.num_steps = num_steps
        """May be set again, where it is known only later."""
        self._title = title
        self._console = console or Console(stderr=True)
        self._is_plain = _wants_plain(self._console) if plain is None else plain
        self._live: Live | None = None
        self._phase: tuple[str, float | None] | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._view: View | None = None
        self._evaluation: tuple[int, str] | None = None
        self._first_step: tuple[int, float] | None = None
        self._left = ""
        self._last_line_s = float("-inf")
        self._last_phase_s = float("-inf")
        self._unsaid: View | None = None

    def __enter__(self) -> TrainingProgress:
        if not self._is_plain:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = None
        self._say_last_step()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str, fraction: float | None = None) -> None:
        """Says what goes on outside steps (loading, profiling, saving), ``fraction`` of it done (0 … 1, None: unknown).

        Lasts until the next phase or step. Plain form: a line when the text changes, and how far it is every ten
        seconds.
        """
        if self._is_plain:
            self._plain_phase(text, fraction)
        self._phase = (text, fraction)

    def _plain_phase(self, text: str, fraction: float | None) -> None:
        now_s, is_new = time.monotonic(), self._phase is None or self._phase[0] != text
        if not is_new and (fraction is None or now_s - self._last_phase_s < _PLAIN_PHASE_EVERY_S):
            return
        self._say_last_step()
        self._line(f"{text} …" if is_new else f"{text}  {fraction:.0%}")
        self._last_phase_s = now_s

    def step(self, view: View) -> None:
        """Shows a step that has ended. The time left is estimated from the steps of this context only, for resumed
        runs."""
        now_s = time.monotonic()
        self._phase = None
        self._view = view
        if self._first_step is None:
            self._first_step = (view.step, now_s)
        self._left = self._time_left(view.step, now_s)
        if not self._is_plain:
            return
        self._unsaid = view
        if now_s - self._last_line_s >= _PLAIN_EVERY_S:
            self._say_last_step()
            self._last_line_s = now_s

    def evaluation(self, step: int, result: float | str) -> None:
        """Shows an evaluation, a loss or what it is in words; it stays in the panel until the next one."""
        text = result if isinstance(result, str) else f"loss {result:.4f}"
        self._evaluation = (step, text)
        self._phase = None
        if self._is_plain:
            self._say_last_step()
            self._line(f"{self._numbered(step)}  evaluation {text}")

    def message(self, text: str) -> None:
        """Prints a line that stays, above the panel."""
        self._say_last_step()
        self._line(text)

    def _say_last_step(self) -> None:
        if self._unsaid is not None:
            self._line(self._plain_step(self._unsaid))
            self._unsaid = None

    def _line(self, text: str) -> None:
        # As Text: brackets are no markup here. Not wrapped: a log file wants one line per line, however long.
        self._console.print(Text(text), soft_wrap=True)

    def _plain_step(self, view: View) -> str:
        return "  ".join(filter(None, [self._numbered(view.step), *view.parts(), self._left]))

    def _numbered(self, step: int) -> str:
        return f"step {step}/{self.num_steps}" if self.num_steps else f"step {step}"

    def _time_left(self, step: int, now_s: float) -> str:
        """From the mean pace since the first step ended, evaluations and saving included; empty before the second and
        at the end."""
        if self._first_step is None or step <= self._first_step[0] or step >= self.num_steps:
            return ""
        first_step, first_s = self._first_step
        left_s = (now_s - first_s) / (step - first_step) * (self.num_steps - step)
        return f"{left_s:.0f} s left" if left_s < 99.5 else f"{human_s(left_s)} left"

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._view is not None:
            parts.append(self._render_view(self._view))
        if self._phase is not None:
            parts.append(self._render_phase(*self._phase))
        if not parts:
            return Text()
        return Panel(
            Group(*parts),
            title=self._title,
            title_align="left",
            border_style="cyan",
            width=min(100, self._console.width),
        )

    def _render_phase(self, text: str, fraction: float | None) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        self._spinner.text = f"{text} …" if fraction is None else f"{text}  {fraction:.0%}"
        cells: list[RenderableType] = [self._spinner]
        if fraction is not None:
            cells.append(ProgressBar(total=1.0, completed=fraction, width=30))
        line.add_row(*cells)
        return line

    def _render_view(self, view: View) -> RenderableType:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(style="bold", no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=max(1, self.num_steps), completed=view.step)
        head.add_row(self._numbered(view.step), bar, self._left)

        facts = Table.grid(padding=(0, 2, 0, 0), expand=True)
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(ratio=1, no_wrap=True)
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(min_width=20, no_wrap=True)
        evaluated = "–" if self._evaluation is None else f"{self._evaluation[1]}  (step {self._evaluation[0]})"
        for row in view.rows(evaluated):
            facts.add_row(*row)
        return Group(head, facts)


def _gauge(share: float) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=min(1.0, share), width=12), f"{share:.0%}")
    return row


def _memory(view: StepView) -> str:
    return f"{human_memory(view.accelerator_bytes)} of {human_memory(view.accelerator_budget_bytes)}"


def _wants_plain(console: Console) -> bool:
    return not console.is_terminal or console.is_dumb_terminal or bool(os.environ.get("CI"))
