"""Latency of one request: every way is in the picture and in the tables, and nothing is cut."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from isthmus.reporting import latency_plot
from isthmus.reporting.canvas import SERIES
from isthmus.reporting.latency_plot import Cells, plot_latency, way_of
from isthmus.reporting.latency_table import latency_markdown, print_latency
from isthmus.spec.report import BenchInferRow, Spread


def row(
    strategy: str, latency_s: float, *, codec: str = "fp32", is_choice: bool = False, num_sub_blocks: int = 1
) -> BenchInferRow:
    return BenchInferRow(
        strategy=strategy,
        codec=codec,
        dtype="fp32",
        num_devices=1 if strategy == "single" else 4,
        tokens=128,
        latency_s=Spread(median=latency_s, p10=0.9 * latency_s, p90=1.2 * latency_s),
        predicted_latency_s=1.1 * latency_s,
        bound_s=0.8 * latency_s,
        bytes_sent_per_device=0 if strategy == "single" else 1_250_000,
        num_exchanges=0 if strategy == "single" else 12,
        max_rel_error=1.2e-7,
        algorithm="two_step" if strategy == "tensor" else "",
        is_choice=is_choice,
        num_sub_blocks=num_sub_blocks,
    )


def cell(mbit_per_s: float) -> list[BenchInferRow]:
    wire_s = 60 / mbit_per_s
    return [
        row("single", 1.0),
        row("tensor", 0.3 + wire_s),
        row("tensor", 0.3 + wire_s / 4, codec="int8"),
        row("sequence", 0.28 + wire_s / 2, is_choice=True),
    ]


def cell_of_two_models(mbit_per_s: float) -> list[BenchInferRow]:
    decoupled = [row("single", 1.2, num_sub_blocks=4), row("block", 0.3 + 6 / mbit_per_s, num_sub_blocks=4)]
    return [*cell(mbit_per_s), *decoupled]


BANDWIDTHS = (1000, 50, 250)
CELLS: Cells = {mbit_per_s * 1e6: cell(mbit_per_s) for mbit_per_s in BANDWIDTHS}
OF_TWO_MODELS: Cells = {mbit_per_s * 1e6: cell_of_two_models(mbit_per_s) for mbit_per_s in BANDWIDTHS}


def colours_in(path: Path) -> set[str]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    return {f"#{colour:06x}" for colour in np.unique(pixels)}


def texts_of(monkeypatch: pytest.MonkeyPatch, cells: Cells, tmp_path: Path) -> set[str]:
    """What is written in the picture, which must all lie inside of it."""
    texts: set[str] = set()

    def look(figure: Any, path: object) -> None:
        figure.canvas.draw()
        inked = figure.get_tightbbox()
        width_in, height_in = figure.get_size_inches()
        assert inked.x0 >= 0 and inked.y0 >= 0 and inked.x1 <= width_in and inked.y1 <= height_in
        texts.update(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(latency_plot, "write_png", look)
    plot_latency(cells, tmp_path / "unused.png", title="the title")
    return texts


def test_picture_has_a_line_for_every_way_that_needs_links(tmp_path: Path) -> None:
    plot_latency(CELLS, tmp_path / "latency.png")
    assert set(SERIES[:3]) <= colours_in(tmp_path / "latency.png")
    assert SERIES[3] not in colours_in(tmp_path / "latency.png")


@pytest.mark.parametrize("cells", [CELLS, {None: cell(50)}], ids=["bandwidths", "one"])
def test_every_word_lies_inside_of_the_picture(cells: Cells, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = texts_of(monkeypatch, cells, tmp_path)
    wanted = {"the title", "predicted", "tensor, fp32 wire", "tensor, int8 wire", "sequence, fp32 wire"}
    wanted |= {"50", "250", "1000", "best single device"} if len(cells) > 1 else {"single", "bound"}
    assert wanted <= texts


def test_a_decoupled_copy_has_a_line_and_bars_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = texts_of(monkeypatch, OF_TWO_MODELS, tmp_path)
    assert lines >= {"block, fp32 wire", "tensor, fp32 wire", "best single device, not decoupled"}
    assert "best single device" not in lines
    bars = texts_of(monkeypatch, {None: cell_of_two_models(50)}, tmp_path)
    assert bars >= {"block, fp32 wire", "tensor, fp32 wire", "single", "single, 4 sub-blocks"}
    alone = texts_of(monkeypatch, {1e9: [row("single", 1.2, num_sub_blocks=4)], 1e8: []}, tmp_path)
    assert "single, 4 sub-blocks" in alone


@pytest.mark.parametrize("decoupled_s", [1.2, 0.4])
def test_the_best_single_device_is_that_of_the_model_that_is_not_decoupled(
    decoupled_s: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heights: list[float] = []

    def look(figure: Any, path: object) -> None:
        [axes] = figure.axes
        heights.extend(line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("best single device"))

    monkeypatch.setattr(latency_plot, "write_png", look)
    rows = [row("single", 1.0), row("single", decoupled_s, num_sub_blocks=4)]
    plot_latency({1e9: rows, 1e8: rows}, tmp_path / "unused.png")
    plot_latency({1e9: rows[1:], 1e8: rows[1:]}, tmp_path / "unused.png")
    assert heights == [1.0, decoupled_s]


def test_of_rows_that_go_the_same_way_the_fastest_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = dataclasses.replace(row("tensor", 100.0), algorithm="mesh")
    plot_latency({None: [row("tensor", 1.0)]}, tmp_path / "one.png")
    plot_latency({None: [slow, row("tensor", 1.0)]}, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_ways_are_told_apart_by_what_is_sent_and_what_is_computed_in() -> None:
    assert way_of(dataclasses.replace(row("single", 1.0), dtype="int8")) == "single, int8 weights"
    assert way_of(row("tensor", 1.0, codec="bf16")) == "tensor, bf16 wire"
    assert way_of(row("block", 1.0, num_sub_blocks=4)) == "block, fp32 wire"
    assert way_of(row("single", 1.0, num_sub_blocks=4)) == "single, 4 sub-blocks"


@pytest.mark.parametrize("cells", [{}, {None: []}, {5e7: []}])
def test_a_picture_of_nothing_is_refused(cells: Cells, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows is empty.*isthmus bench infer --report"):
        plot_latency(cells, tmp_path / "latency.png")


def test_rows_of_unknown_bandwidth_do_not_lie_on_an_axis_of_bandwidths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bandwidth: got None among several"):
        plot_latency({None: cell(50), 5e7: cell(50)}, tmp_path / "latency.png")


def test_markdown_stays_as_it_is() -> None:
    assert latency_markdown([row("single", 1.0), row("tensor", 0.5, codec="int8", is_choice=True)]) == (
        "| strategy | devices | wire | dtype | bound | measured (p10–p90) | of bound | predicted | off by | sent | "
        "exchanges | error |\n"
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| **tensor two_step** | **4** | **int8** | **fp32** | **400 ms** | **500 ms (450 ms–600 ms)** | **0.80** | "
        "**550 ms** | **+10%** | **1.25 MB** | **12** | **1.2e-07** |\n"
        "| single | 1 |  | fp32 | 800 ms | 1.00 s (900 ms–1.20 s) | 0.80 | 1.10 s | +10% | 0 B | 0 | 1.2e-07 |\n"
    )


def test_markdown_tells_a_decoupled_model_from_one_that_is_not() -> None:
    assert latency_markdown([row("single", 1.0), row("single", 1.25, num_sub_blocks=4)]) == (
        "| strategy | sub-blocks | devices | wire | dtype | bound | measured (p10–p90) | of bound | predicted | off by "
        "| sent | exchanges | error |\n"
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| single |  | 1 |  | fp32 | 800 ms | 1.00 s (900 ms–1.20 s) | 0.80 | 1.10 s | +10% | 0 B | 0 | 1.2e-07 |\n"
        "| single | 4 | 1 |  | fp32 | 1.00 s | 1.25 s (1.12 s–1.50 s) | 0.80 | 1.38 s | +10% | 0 B | 0 | 1.2e-07 |\n"
    )


def generating(name: str, latency_s: float, **changes: Any) -> BenchInferRow:
    return dataclasses.replace(
        row(name, latency_s, **changes),
        num_new_tokens=32,
        time_to_first_token_s=Spread(median=0.25, p10=0.2, p90=0.3),
        time_per_token_s=Spread(median=0.02, p10=0.018, p90=0.03),
        predicted_time_to_first_token_s=0.3,
        predicted_time_per_token_s=0.021,
    )


def test_markdown_of_generation_has_the_tokens_too() -> None:
    assert latency_markdown([generating("tensor", 0.5)]) == (
        "| strategy | devices | wire | dtype | bound | measured (p10–p90) | of bound | predicted | off by | "
        "first token | token (p10–p90) | token predicted | sent | exchanges | error |\n"
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        "| tensor two_step | 4 | fp32 | fp32 | 400 ms | 500 ms (450 ms–600 ms) | 0.80 | 550 ms | +10% | 250 ms | "
        "20.0 ms (18.0 ms–30.0 ms) | 21.0 ms | 1.25 MB | 12 | 1.2e-07 |\n"
    )


@pytest.mark.parametrize("new", [row, generating])
def test_table_has_all_columns_where_they_fit_and_a_few_on_80(new: Callable[..., BenchInferRow]) -> None:
    assert "exchanges" in printed({None: [new("tensor", 0.1)]}, 200)
    for bandwidth in (None, 5e7):
        text = printed({bandwidth: [new("single", 0.123), new("tensor", 0.1, codec="int8")]}, 80)
        assert "exchanges" not in text and "…" not in text
        assert sum(" ms " in line for line in text.splitlines()) == 2


def test_table_of_two_models_is_whole_on_80_columns_and_says_what_ways_are_mixed() -> None:
    mixed = dataclasses.replace(row("block", 0.2, num_sub_blocks=4), algorithm="gather+tokens+sequence")
    text = printed({5e7: [*cell_of_two_models(50), mixed]}, 80)
    assert "blocks" in text and "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "gather+tokens+sequence" in "".join(text.split())
    assert "tensor two_step" in text  # only the mixed one takes a second line
    assert "blocks" not in printed({5e7: cell(50)}, 80)


def test_table_has_each_bandwidth_once_widest_first_and_marks_the_choice() -> None:
    text = printed(CELLS, 80)
    assert [line[:7].strip() for line in text.splitlines() if line[:7].strip().isdigit()] == ["1000", "250", "50"]
    marked = [line for line in text.splitlines() if "→" in line]
    assert len(marked) == 3 and all("sequence" in line for line in marked)


def printed(cells: Cells, width: int) -> str:
    output = io.StringIO()
    print_latency(cells, Console(file=output, width=width))
    return output.getvalue()


def simulated(strategy: str, latency_s: float, **more: Any) -> BenchInferRow:
    exactly = Spread(median=latency_s, p10=latency_s, p90=latency_s)
    return dataclasses.replace(
        row(strategy, latency_s),
        latency_s=exactly,
        predicted_latency_s=latency_s,
        max_rel_error=None,
        transport="simulated",
        **more,
    )


def test_what_was_simulated_is_nowhere_called_measured_or_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [simulated("single", 1.0), simulated("tensor", 0.5, is_choice=True)]
    assert latency_markdown(rows) == (
        "| strategy | devices | wire | dtype | bound | simulated | of bound | sent | exchanges |\n"
        "|---|---:|---|---|---:|---:|---:|---:|---:|\n"
        "| **tensor two_step** | **4** | **fp32** | **fp32** | **400 ms** | **500 ms** | **0.80** "
        "| **1.25 MB** | **12** |\n"
        "| single | 1 |  | fp32 | 800 ms | 1.00 s | 0.80 | 0 B | 0 |\n"
    )
    several: Cells = {1e9: rows, 1e8: rows}
    one: Cells = {None: rows}
    for cells in (several, one):
        texts = texts_of(monkeypatch, cells, tmp_path)
        assert "seconds per request (simulated)" in texts
        assert not [text for text in texts if "predicted" in text or "p10" in text]


@pytest.mark.parametrize("is_generated", [False, True])
def test_a_simulated_table_of_two_models_breaks_no_word_on_80_columns(is_generated: bool) -> None:
    exactly = Spread(median=0.25, p10=0.25, p90=0.25)
    more: dict[str, Any] = {}
    if is_generated:
        more = dict(num_new_tokens=2, time_to_first_token_s=exactly, time_per_token_s=exactly)
    rows = [simulated("tensor", 0.5, **more), simulated("block", 0.4, is_choice=True, num_sub_blocks=4, **more)]
    text = printed({1e9: rows, 1.25e8: rows}, 80)
    assert text.count("tensor two_step") == 2 and text.count("500 ms") == (0 if is_generated else 2)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "dtype" in printed({1e9: rows}, 160) and "dtype" not in text


def test_a_table_of_simulated_tokens_has_their_seconds() -> None:
    exactly = Spread(median=0.25, p10=0.25, p90=0.25)
    text = latency_markdown(
        [simulated("tensor", 0.5, num_new_tokens=2, time_to_first_token_s=exactly, time_per_token_s=exactly)]
    )
    assert "| first token simulated | token simulated | sent |" in text and "| 250 ms | 250 ms |" in text
