from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from isthmus.reporting.comparison import comparison_markdown, comparison_table, plot_comparison
from isthmus.spec.report import BenchTuneRow, Spread


def row(policy: str, tokens_per_s: float, *, skew: str | float = 0.2, cpu_speed: float = 0.25) -> BenchTuneRow:
    return BenchTuneRow(
        policy=policy,
        skew=skew,
        measured_skew=0.21,
        cpu_speed=cpu_speed,
        tokens_per_s=Spread(median=tokens_per_s, p10=tokens_per_s - 10, p90=tokens_per_s + 10),
        bound_share=0.75,
        h2d_bytes_per_step=1.25e9,
        share_of_tokens_on_cpu=0.12,
    )


ONE_SETTING = [row("mobius", 600), row("affinity", 1200), row("paper", 900)]


def sweep() -> list[BenchTuneRow]:
    return [
        row(policy, speed * 1000, skew=skew, cpu_speed=cpu_speed)
        for cpu_speed in (0.25, 1)
        for skew in (0.4, "uniform", 0.2)
        for policy, speed in (("affinity", 1.2), ("mobius", 0.6))
    ]


def rendered(rows: list[BenchTuneRow], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_markdown_stays_as_it_is() -> None:
    assert comparison_markdown(ONE_SETTING) == (
        "**CPU speed 1/4, skew 0.2 (measured G 0.21)**\n"
        "\n"
        "| policy | tokens/s | p10–p90 | of best | of bound | H2D per step | tokens on CPU |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| **affinity** | **1,200** | **1,190–1,210** | **1.00** | **75%** | **1.25 GB** | **12%** |\n"
        "| paper | 900 | 890–910 | 0.75 | 75% | 1.25 GB | 12% |\n"
        "| mobius | 600 | 590–610 | 0.50 | 75% | 1.25 GB | 12% |\n"
    )


def test_table_holds_every_number_uncut() -> None:
    assert "…" not in rendered([row("gpipe-offload", 12_345, skew="uniform"), row("affinity", 23_456, skew="uniform")])
    text = rendered(ONE_SETTING)
    assert "…" not in text
    for said in ("1/4", "0.2", "affinity", "1,190–1,210", "0.75", "75%", "1.25 GB", "12%"):
        assert said in text


def test_settings_go_from_fast_to_slow_and_from_uniform_to_skewed() -> None:
    titles = [line for line in comparison_markdown(sweep()).splitlines() if line.startswith("**CPU")]
    wanted = [f"CPU speed {speed}, skew {skew}" for speed in ("full", "1/4") for skew in ("uniform", "0.2", "0.4")]
    assert [title.strip("*").rpartition(" (")[0] for title in titles] == wanted
    assert rendered(sweep()).count("affinity") == 6


@pytest.mark.parametrize(("rows", "num_panels"), [(ONE_SETTING, 1), (sweep(), 2)])
def test_picture_grows_with_the_panels(tmp_path: Path, rows: list[BenchTuneRow], num_panels: int) -> None:
    plot_comparison(rows, tmp_path / "policies.png")
    width = matplotlib.image.imread(tmp_path / "policies.png").shape[1]
    assert (width > 1000) == (num_panels > 1)


def test_incomplete_sweep_is_drawn(tmp_path: Path) -> None:
    plot_comparison(sweep()[:-1], tmp_path / "policies.png")
    assert (tmp_path / "policies.png").stat().st_size > 0


def test_bench_without_rows_is_refused(tmp_path: Path) -> None:
    for show in (comparison_markdown, comparison_table):
        with pytest.raises(ValueError, match="rows is empty"):
            show([])
    with pytest.raises(ValueError, match="rows is empty"):
        plot_comparison([], tmp_path / "policies.png")
