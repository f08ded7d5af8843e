"""How ``isthmus plan tune`` says what it found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from isthmus.reporting.human import human_bytes, human_memory, human_s
from isthmus.spec.plan_tune import Change, DeviceNeed, HostNeed, LinkUse, PlanTuneReport

MOST_ROWS = 16
"""Of a table: of more accelerators those with the least room."""


def show(report: PlanTuneReport, title: str, console: Console) -> None:
    """Prints the whole plan."""
    verdict = "it fits" if report.fits else "it does not fit"
    console.print(f"{title}: {verdict}", highlight=False, markup=False, soft_wrap=True)
    for line in shortages(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.devices:
        console.print(_devices(report.devices))
    console.print(_hosts(report.hosts))
    if report.links:
        console.print(_links(report.links, report.step.step_s if report.step else 0.0))
    for line in [*_time(report), *_changes(report.changes, report.fits)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def shortages(report: PlanTuneReport) -> Iterator[str]:
    """Which accelerators and hosts are over, and by how much."""
    for name, needs in (("accelerators", report.devices), ("hosts", report.hosts)):
        short = [need for need in needs if need.short_bytes]
        if short:
            worst = max(short, key=lambda need: need.short_bytes)
            if isinstance(worst, DeviceNeed):
                number, needed, what = worst.device, worst.minimum_bytes, "accelerator"
            else:
                number, needed, what = worst.host, worst.total_bytes, "host"
            yield (
                f"{len(short)} of {len(needs)} {name} have too little memory: {what} {number} is short of "
                f"{human_memory(worst.short_bytes)} (needs {human_memory(needed)}, has "
                f"{human_memory(worst.memory_bytes)})"
            )


def _table(*columns: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True, caption_justify="left"
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if not number else "right", no_wrap=True)
    return table


def _devices(needs: Sequence[DeviceNeed]) -> Table:
    shown = sorted(needs, key=lambda need: need.memory_bytes - need.minimum_bytes)[:MOST_ROWS]
    unit = _Unit.of([need.memory_bytes for need in shown])
    table = _table(unit.name, "host", "layers", "dense", "activations", "experts", "in all", "of", "least")
    for need in sorted(shown, key=lambda need: need.device):
        number = "all" if need.num_slots >= need.num_experts else f"{need.num_slots} of {need.num_experts}"
        slots = f"{unit(need.num_slots * need.slot_bytes)} ({number})"
        table.add_row(
            f"{need.device}",
            f"{need.host}",
            f"{need.num_layers} in {need.num_stages}",
            unit(need.dense_bytes) + ("" if need.is_dense_resident else "*"),
            unit(need.activation_bytes),
            "none" if need.short_bytes else slots,
            unit(need.total_bytes),
            unit(need.memory_bytes),
            unit(need.minimum_bytes),
        )
    table.caption = "layers in stages; least: what it takes at least"
    if not all(need.is_dense_resident for need in shown):
        table.caption += "; * a few layers at a time"
    return table


def _hosts(needs: Sequence[HostNeed]) -> Table:
    shown = sorted(needs, key=lambda need: need.memory_bytes - need.total_bytes)[:MOST_ROWS]
    unit = _Unit.of([need.memory_bytes for need in shown])
    table = _table(unit.name, "weights", "masters", "gradients", "moments", "tokens", "in all", "of")
    for need in sorted(shown, key=lambda need: need.host):
        kinds = need.kinds_bytes
        moments = kinds["exp_avg"] + kinds["exp_avg_sq"]
        sizes = (kinds["weight"], kinds["master"], kinds["gradient"], moments, kinds["staging"])
        cells = [unit(size) for size in (*sizes, need.total_bytes, need.memory_bytes)]
        table.add_row(f"host {need.host}", *cells)
    return table


@dataclass(frozen=True)
class _Unit:
    """What a table's sizes are told in: so its columns are narrow enough for any terminal."""

    name: str
    num_bytes: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> _Unit:
        units = [cls("KiB", 1 << 10), cls("MiB", 1 << 20), cls("GiB", 1 << 30)]
        return next((unit for unit in reversed(units) if max(sizes) >= unit.num_bytes), units[0])

    def __call__(self, num_bytes: int) -> str:
        value = num_bytes / self.num_bytes
        return f"{value:,.0f}" if value >= 100 or not num_bytes else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _links(links: Sequence[LinkUse], step_s: float) -> Table:
    table = _table("link, bytes of a step", "there", "back", "at", "busy")
    for link in links:
        busy_s = max(link.there_bytes / link.there_bytes_per_s, link.back_bytes / link.back_bytes_per_s)
        table.add_row(
            link.name,
            human_bytes(link.there_bytes),
            human_bytes(link.back_bytes),
            f"{human_bytes(link.there_bytes_per_s)}/s",
            f"{busy_s / step_s:.0%}" if step_s else "",
        )
    return table


def _time(report: PlanTuneReport) -> Iterator[str]:
    step = report.step
    if step is None:
        yield f"no time is predicted: {report.reason}"
        return
    stages = f"{step.num_stages} stages" if step.num_stages > 1 else "one stage"
    yield (
        f"a step takes {human_s(step.step_s)}, {step.tokens_per_s:,.0f} tokens/s, in {stages} "
        f"(simulated); {step.bound_share:.0%} of the bound, {human_s(step.bound_s)}"
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(step.busy_shares.items(), key=lambda i: -i[1]))
    yield f"busy: {shares}; {step.cpu_pairs_share:.0%} of (token, expert) pairs on CPUs"
    if report.changes:
        yield f"what limits it most: {report.limiting}"


def _changes(changes: Sequence[Change], fits: bool) -> Iterator[str]:
    if not changes:
        return
    yield "what would help most, each by itself:" if fits else "with what it would fit, each by itself:"
    for change in changes:
        rate = f": {change.tokens_per_s:,.0f} tokens/s" if change.tokens_per_s else ""
        yield f"  {change.change}{rate}" + (f", {change.gain:.2f} ×" if change.gain else "")
