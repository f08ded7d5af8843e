from __future__ import annotations

import io

import pytest
from rich.console import Console

from isthmus.reporting.progress import StepView, TrainingProgress


def view(step: int) -> StepView:
    return StepView(
        step=step,
        loss=2.5,
        learning_rate=1e-4,
        tokens_per_s=1234.0,
        num_experts_on_cpu=40,
        num_experts_on_accelerator=88,
        copy_engine_use=0.82,
        bound_share=0.73,
        accelerator_bytes=7 << 30,
        accelerator_budget_bytes=8 << 30,
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("isthmus.reporting.progress.time.monotonic", clock)
    return clock


def plain_run(num_steps: int, seconds_per_step: float, clock: Clock) -> list[str]:
    file = io.StringIO()
    with TrainingProgress(num_steps, console=Console(file=file, width=20), plain=True) as progress:
        for step in range(1, num_steps + 1):
            clock.now_s += seconds_per_step
            progress.step(view(step))
    return file.getvalue().splitlines()


def test_plain_lines_are_rate_limited_but_show_the_first_and_the_last(clock: Clock) -> None:
    lines = plain_run(101, 0.1, clock)
    shown = [int(line.split()[1].split("/")[0]) for line in lines]
    assert shown[0] == 1 and shown[-1] == 101
    assert len(shown) == len(set(shown)) <= 7


def test_slow_steps_all_have_a_line(clock: Clock) -> None:
    assert len(plain_run(4, 5.0, clock)) == 4


def test_plain_line_says_everything_in_one_line(clock: Clock) -> None:
    line = plain_run(4, 5.0, clock)[1]
    assert line == (
        "step 2/4  loss 2.5000  lr 1.00e-04  1,234 tokens/s  experts 40 CPU / 88 accelerator  copies 82%  bound 73%  "
        "memory 7.00 GiB of 8.00 GiB  10 s left"
    )


def test_last_step_is_said_when_the_run_stops_early(clock: Clock) -> None:
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), TrainingProgress(9, console=Console(file=file), plain=True) as progress:
        progress.step(view(1))
        progress.step(view(2))
        raise KeyboardInterrupt
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/9", "2/9"]


def test_time_left_counts_from_the_first_step_of_a_resumed_run(clock: Clock) -> None:
    file = io.StringIO()
    with TrainingProgress(1000, console=Console(file=file), plain=True) as progress:
        progress.step(view(900))
        clock.now_s += 10.0
        progress.step(view(901))
    first, second = file.getvalue().splitlines()
    assert "left" not in first and second.endswith("16 min 30 s left")


def test_a_number_of_steps_that_is_not_known_yet_is_not_told() -> None:
    file = io.StringIO()
    with TrainingProgress(0, console=Console(file=file), plain=True) as progress:
        progress.evaluation(0, 1.25)
        progress.step(view(1))
        progress.num_steps = 9
        progress.step(view(2))
    assert [line.split("  ")[0] for line in file.getvalue().splitlines()] == ["step 0", "step 1", "step 2/9"]


def test_a_long_plain_phase_says_every_ten_seconds_how_far_it_is(clock: Clock) -> None:
    file = io.StringIO()
    with TrainingProgress(0, console=Console(file=file), plain=True) as progress:
        for done in range(11):
            progress.phase("loading", done / 10)
            clock.now_s += 4
    assert file.getvalue().splitlines() == ["loading …", "loading  30%", "loading  60%", "loading  90%"]


def test_plain_phases_evaluations_and_messages_keep_their_order(clock: Clock) -> None:
    file = io.StringIO()
    with TrainingProgress(9, console=Console(file=file), plain=True) as progress:
        progress.phase("loading", 0.0)
        progress.phase("loading", 0.5)
        progress.step(view(1))
        progress.step(view(2))
        progress.evaluation(2, 1.25)
        progress.message("saved [bold]out[/bold]")
        progress.phase("saving")
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "loading …",
        "step 1/9",
        "step 2/9",
        "step 2/9",
        "saved [bold]out[/bold]",
        "saving …",
    ]
    assert lines[3] == "step 2/9  evaluation loss 1.2500"


def live_run(width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with TrainingProgress(4, console=console, plain=False) as progress:
        progress.phase("loading", 0.25)
        progress.step(view(1))
        progress.evaluation(1, 1.25)
        progress.message("kept [bold]as it is[/bold]")
        progress.phase("saving", 0.5)
    return file.getvalue()


def test_live_panel_shows_everything_at_the_end() -> None:
    panel = live_run(80).rpartition("╭")[2]
    said = ("step 1/4", "2.5000", "1.2500", "1,234", "40 CPU · 88 accelerator", "82%", "73%", "7.00 GiB of 8.00 GiB")
    for text in said:
        assert text in panel
    assert "…" not in panel and "saving" not in panel


def test_messages_do_not_touch_the_panel() -> None:
    output = live_run(80)
    assert "kept [bold]as it is[/bold]" in output
    assert output.count("[bold]") == 1


@pytest.mark.parametrize(
    ("is_terminal", "environment", "is_live"),
    [(True, {}, True), (True, {"CI": "true"}, False), (True, {"TERM": "dumb"}, False), (False, {}, False)],
)
def test_panel_is_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, environment: dict[str, str], is_live: bool
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    with TrainingProgress(1, console=Console(file=file, force_terminal=is_terminal)) as progress:
        progress.step(view(1))
    assert ("╭" in file.getvalue()) == is_live
