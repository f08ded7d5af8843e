"""Owns how a bench report is shown: policies beside each other as a terminal table, as markdown and as a picture.

A *setting* is a CPU speed and a skew; the policies were run in pairs within each, so only rows of one setting compare.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from isthmus.reporting.canvas import INK, MUTED, RULE, SERIES, draw_title, new_figure, quiet_axes, write_png
from isthmus.reporting.human import human_bytes
from isthmus.spec.report import BenchTuneRow

Setting = tuple[float, str | float]
"""(cpu_speed, skew)"""

_COLUMNS = ("policy", "tokens/s", "p10–p90", "of best", "of bound", "H2D per step", "tokens on CPU")


def comparison_table(rows: Iterable[BenchTuneRow], *, title: str = "") -> Table:
    """A rich table with a section per setting, the fastest policy first and bold. Raises ``ValueError`` without
    rows."""
    from rich import box

    table = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        header_style="bold",
        pad_edge=False,
        padding=0,
    )
    settings = _by_setting(rows)
    for column in ("CPU", "skew", *_COLUMNS):
        is_text = column in ("CPU", "skew", "policy")
        # Two-line heads keep the table inside 80 columns.
        table.add_column(_two_lines(column), justify="left" if is_text else "right", no_wrap=True)
    for (speed, skew), of_setting in settings.items():
        table.add_section()
        for place, row in enumerate(of_setting):
            where = (_speed(speed), _skew(skew)) if place == 0 else ("", "")
            table.add_row(*where, *_cells(row, of_setting[0]), style="bold green" if place == 0 else "")
    return table


def comparison_markdown(rows: Iterable[BenchTuneRow]) -> str:
    """The same as GitHub markdown: a heading line and a table per setting, the fastest policy first and bold."""
    parts = []
    for setting, of_setting in _by_setting(rows).items():
        lines = [f"**{_setting_title(setting, of_setting)}**", "", f"| {' | '.join(_COLUMNS)} |"]
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(_COLUMNS) - 1)) + "|")
        for place, row in enumerate(of_setting):
            cells = _cells(row, of_setting[0])
            lines.append("| " + " | ".join(f"**{cell}**" if place == 0 else cell for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot_comparison(rows: Sequence[BenchTuneRow], path: str | os.PathLike[str], *, title: str = "Policies") -> None:
    """Writes the picture (PNG): a panel per CPU speed, skew along x, tokens/s up, a line with its p10–p90 band per
    policy.

    With one skew only, lines would be points, so each panel has a bar per policy instead. Raises ``ValueError``
    without rows.
    """
    settings = _by_setting(rows)
    speeds = sorted({speed for speed, _ in settings}, reverse=True)
    skews = sorted({skew for _, skew in settings}, key=_skew_order)
    policies = list(dict.fromkeys(row.policy for row in rows))
    colours = {policy: SERIES[i % len(SERIES)] for i, policy in enumerate(policies)}
    width_in = max(5.0, 3.4 * len(speeds))
    legend_in = 1.9 if len(skews) > 1 else 0.2
    figure = new_figure(width_in + legend_in, 4.4)
    all_axes = figure.subplots(1, len(speeds), sharey=True, squeeze=False)[0]
    bottom = 0.15 if len(skews) > 1 else 0.22
    right = width_in / (width_in + legend_in)
    figure.subplots_adjust(left=0.7 / (width_in + legend_in), right=right, top=0.79, bottom=bottom, wspace=0.08)
    for axes, speed in zip(all_axes, speeds, strict=True):
        quiet_axes(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_title(f"CPU speed {_speed(speed)}", fontsize=10, color=INK, loc="left")
        found = {(row.policy, row.skew): row for row in rows if row.cpu_speed == speed}
        if len(skews) == 1:
            _draw_bars(axes, found, policies, skews[0], colours)
        else:
            _draw_lines(axes, found, policies, skews, colours)
        axes.set_ylim(bottom=0)
    all_axes[0].set_ylabel("tokens per second", fontsize=9, color=MUTED)
    draw_title(figure, all_axes[0].get_position().x0, 0.92, title)
    if len(skews) > 1:
        handles, labels = all_axes[0].get_legend_handles_labels()
        at = ((width_in + 0.1) / (width_in + legend_in), 0.79)
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=at, frameon=False, fontsize=9.5, labelcolor=INK)
    write_png(figure, path)


def _draw_lines(
    axes: Any,
    found: dict[tuple[str, str | float], BenchTuneRow],
    policies: Sequence[str],
    skews: Sequence[str | float],
    colours: dict[str, str],
) -> None:
    for order, policy in enumerate(policies):
        places = [place for place, skew in enumerate(skews) if (policy, skew) in found]
        spreads = [found[policy, skews[place]].tokens_per_s for place in places]
        low, high = [spread.p10 for spread in spreads], [spread.p90 for spread in spreads]
        axes.fill_between(places, low, high, color=colours[policy], alpha=0.13, linewidth=0)
        medians = [spread.median for spread in spreads]
        # The first policy is the one the report is about: it lies on top.
        axes.plot(
            places,
            medians,
            color=colours[policy],
            linewidth=2,
            marker="o",
            markersize=5,
            label=policy,
            zorder=10 - order,
        )
    axes.set_xticks(range(len(skews)), [_skew(skew) for skew in skews])
    axes.set_xlabel("skew G", fontsize=9, color=MUTED)
    axes.margins(x=0.08)


def _draw_bars(
    axes: Any,
    found: dict[tuple[str, str | float], BenchTuneRow],
    policies: Sequence[str],
    skew: str | float,
    colours: dict[str, str],
) -> None:
    present = [policy for policy in policies if (policy, skew) in found]
    for place, policy in enumerate(present):
        spread = found[policy, skew].tokens_per_s
        # Quantiles of few runs may be rounded past the median; an error bar has no negative length.
        error = [[max(0.0, spread.median - spread.p10)], [max(0.0, spread.p90 - spread.median)]]
        axes.bar(
            place, spread.median, width=0.7, color=colours[policy], yerr=error, ecolor=INK, error_kw={"linewidth": 1}
        )
        axes.annotate(
            f"{spread.median:,.0f}",
            (place, max(spread.median, spread.p90)),
            (0, 3),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            ha="center",
        )
    axes.set_xticks(range(len(present)), present, rotation=30, ha="right", rotation_mode="anchor")
    axes.margins(y=0.1)


def _two_lines(column: str) -> str:
    return column.replace(" per ", "\nper ").replace(" on ", "\non ").replace("of ", "of\n")


def _by_setting(rows: Iterable[BenchTuneRow]) -> dict[Setting, list[BenchTuneRow]]:
    """Rows by setting, fastest first; settings from the fastest CPU down and from uniform to skewed."""
    settings: dict[Setting, list[BenchTuneRow]] = {}
    for row in rows:
        settings.setdefault((row.cpu_speed, row.skew), []).append(row)
    if not settings:
        raise ValueError("rows is empty, wanted the rows of a bench report: run isthmus bench tune --report first")
    for of_setting in settings.values():
        of_setting.sort(key=lambda row: -row.tokens_per_s.median)
    return dict(sorted(settings.items(), key=lambda item: (-item[0][0], _skew_order(item[0][1]))))


def _cells(row: BenchTuneRow, best: BenchTuneRow) -> list[str]:
    spread = row.tokens_per_s
    return [
        row.policy,
        f"{spread.median:,.0f}",
        f"{spread.p10:,.0f}–{spread.p90:,.0f}",
        f"{spread.median / best.tokens_per_s.median:.2f}" if best.tokens_per_s.median else "–",
        f"{row.bound_share:.0%}",
        human_bytes(row.h2d_bytes_per_step),
        f"{row.share_of_tokens_on_cpu:.0%}",
    ]


def _setting_title(setting: Setting, rows: Sequence[BenchTuneRow]) -> str:
    speed, skew = setting
    measured = sum(row.measured_skew for row in rows) / len(rows)
    return f"CPU speed {_speed(speed)}, skew {_skew(skew)} (measured G {measured:.2f})"


def _speed(speed: float) -> str:
    """``full``, ``1/4`` or ``0.30``."""
    if speed == 1:
        return "full"
    parts = round(1 / speed)
    return f"1/{parts}" if abs(parts * speed - 1) < 1e-6 else f"{speed:.2f}"


def _skew(skew: str | float) -> str:
    return skew if isinstance(skew, str) else f"{skew:g}"


def _skew_order(skew: str | float) -> tuple[int, float, str]:
    """``uniform`` first, then by G."""
    return (0, 0.0, skew) if isinstance(skew, str) else (1, skew, "")
