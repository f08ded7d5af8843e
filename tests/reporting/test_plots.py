from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from isthmus.reporting.canvas import SERIES, draw_title, new_figure
from isthmus.reporting.devices_plot import plot_devices
from isthmus.reporting.fidelity_plot import plot_fidelity
from isthmus.reporting.loss_plot import plot_losses, running_mean
from isthmus.reporting.popularity_plot import plot_popularity, popularity_skew
from isthmus.reporting.timeline_plot import plot_timeline
from isthmus.spec.plan import Stage
from isthmus.spec.report import FidelityPoint, StepRecord
from isthmus.spec.timeline import Span, Timeline


def colours_in(path: Path) -> set[str]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    return {f"#{colour:06x}" for colour in np.unique(pixels)}


def record(step: int, loss: float, evaluation_loss: float | None = None) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        num_tokens=1,
        duration_s=1.0,
        bound_s=1.0,
        h2d_bytes=0,
        d2h_bytes=0,
        num_experts_on_cpu=0,
        num_experts_on_accelerator=0,
        optimizer_s=0.0,
        learning_rate=0.1,
        evaluation_loss=evaluation_loss,
    )


def test_importing_reporting_loads_neither_torch_nor_matplotlib() -> None:
    code = """if True:
        import sys
        from isthmus.reporting import chrome_trace, comparison, environment, host_memory, latency_table, loss_plot
        from isthmus.reporting import popularity_plot, progress, recorder, timeline_plot
        environment.environment()
        assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)
        """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_long_title_ends_inside_the_picture_and_a_short_one_keeps_its_size() -> None:
    figure = new_figure(8, 4)
    for title in ("Loss", "a model in a far directory, " * 8):
        draw_title(figure, 0.09, 0.9, title)
    short, long = figure.texts
    assert (short.get_fontsize(), long.get_window_extent().x1 <= figure.bbox.width) == (13, True)
    assert long.get_window_extent().x1 > 0.9 * figure.bbox.width


def test_drawing_leaves_pyplot_alone(tmp_path: Path, run_timeline: Timeline) -> None:
    plot_timeline(run_timeline, tmp_path / "timeline.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_timeline_shows_every_kind_of_the_middle_steps(tmp_path: Path, run_timeline: Timeline) -> None:
    plot_timeline(run_timeline, tmp_path / "timeline.png", title="affinity")
    wanted = {"#2f6db3", "#2f9e68", "#e07b39", "#7fb4e0", "#f2c037", "#cf5c6f", "#b08968", "#7d5a44", "#f1f3f5"}
    assert wanted <= colours_in(tmp_path / "timeline.png")


def test_timeline_leaves_out_other_steps(tmp_path: Path) -> None:
    spans = [Span(lane="h2d", name="x", start_s=step, end_s=step + 0.5, kind="load_expert") for step in range(3)]
    spans[0] = Span(lane="d2h", name="x", start_s=0.0, end_s=0.5, kind="gradient")
    steps = tuple((step, float(step), step + 1.0) for step in range(3))
    plot_timeline(Timeline(spans=tuple(spans), steps=steps), tmp_path / "timeline.png", num_steps=1)
    colours = colours_in(tmp_path / "timeline.png")
    assert "#7fb4e0" in colours and "#cf5c6f" not in colours


def test_timeline_without_steps_and_with_unknown_kinds_is_drawn_whole(tmp_path: Path) -> None:
    spans = tuple(Span(lane="h2d", name="", start_s=i, end_s=i + 1, kind=kind) for i, kind in enumerate(("", "odd")))
    plot_timeline(Timeline(spans=spans), tmp_path / "timeline.png")
    assert {"#4f9d9d", "#9c6b98"} <= colours_in(tmp_path / "timeline.png")


def test_empty_timeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no spans in the steps to show.*keep_spans=True"):
        plot_timeline(Timeline(spans=(), steps=((1, 0.0, 1.0),)), tmp_path / "timeline.png")
    assert not list(tmp_path.iterdir())


def test_skew_is_the_sum_of_squared_shares() -> None:
    np.testing.assert_allclose(popularity_skew(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])), [0.25, 1, 0.5])


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (4, 8), (64, 128)])
def test_popularity_is_drawn_for_any_number_of_experts(tmp_path: Path, num_layers: int, num_experts: int) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (num_layers, num_experts)) + 1
    plot_popularity({2 * layer + 1: list(row) for layer, row in enumerate(counts)}, tmp_path / "popularity.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "popularity.png").shape
    assert width <= 2200 and height <= 2200


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no experts"),
        ({0: [1, 2], 1: [1]}, r"\[1, 2\] experts.*the same number"),
        ({0: [1, -1]}, "negative or non-finite"),
        ({0: [1, float("nan")]}, "negative or non-finite"),
        ({3: [1, 1], 5: [0, 0]}, r"no tokens in layers \[5\]"),
    ],
)
def test_popularity_names_what_is_wrong(tmp_path: Path, counts: dict[int, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_popularity(counts, tmp_path / "popularity.png")


@pytest.mark.parametrize("num_steps", [1, 8, 60])
def test_losses_are_drawn_with_and_without_evaluations(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "loss.png"
    plot_losses([record(step, 3.0 / (step + 1)) for step in range(num_steps)], path)
    assert "#2563a8" in colours_in(path) and "#d9480f" not in colours_in(path)
    plot_losses([record(step, float("nan") if step == 2 else 3.0, 2.5) for step in range(num_steps)], path)
    assert "#d9480f" in colours_in(path)


def test_losses_without_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records is empty"):
        plot_losses([], tmp_path / "loss.png")


def test_running_mean_does_not_trail() -> None:
    falling = [100.0 - step for step in range(100)]
    assert running_mean(falling) == pytest.approx(falling)
    holed = [1.0, float("nan"), float("inf"), 1.0, 1.0, 1.0, 1.0]
    assert running_mean(holed)[3:] == [1.0] * 4


def test_figures_are_independent() -> None:
    assert new_figure(1.0, 1.0) is not new_figure(1.0, 1.0)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_fidelity_is_drawn_for_encoders_and_decoders(tmp_path: Path, is_decoder: bool) -> None:
    path = tmp_path / "fidelity.png"
    kind = {"original_loss": 2.0, "divergence": 0.1} if is_decoder else {"cosine": 0.9, "spearman": 0.8}
    points = [FidelityPoint(step=n, minutes=n / 2, num_tokens=n, loss=2.0 + 1 / (n + 1), **kind) for n in range(3)]  # type: ignore[arg-type]
    plot_fidelity(points, path)
    colours = colours_in(path)
    assert "#2563a8" in colours and ("#d9480f" in colours) != is_decoder


def test_fidelity_without_a_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curve is empty, wanted at least one point"):
        plot_fidelity([], tmp_path / "fidelity.png")


def test_devices_below_one_another_have_a_colour_per_stage(tmp_path: Path, run_timeline: Timeline) -> None:
    stages = [Stage(first_layer=0, last_layer=1), Stage(first_layer=2, last_layer=3)]
    plot_devices([run_timeline, run_timeline], stages, tmp_path / "devices.png", title="affinity")
    assert {*SERIES[:2], "#f1f3f5"} <= colours_in(tmp_path / "devices.png")


def test_no_spans_of_any_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"devices: no timeline has spans: record with keep_spans=True"):
        plot_devices([Timeline(spans=())], [], tmp_path / "devices.png", title="affinity")
