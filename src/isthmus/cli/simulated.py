"""What ``isthmus simulate infer`` prints and writes. It is here since only the command line sees both simulation and
reporting, and loads no torch unless a checkpoint's configuration is to be read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from isthmus.reporting.human import human_memory, human_s
from isthmus.reporting.latency_plot import Cells, plot_latency
from isthmus.reporting.latency_table import latency_markdown, print_latency
from isthmus.reporting.tables import compact_table
from isthmus.simulation.devices import KINDS, devices_of, read_devices
from isthmus.simulation.inference import at_bandwidth, simulate
from isthmus.simulation.published import STRATEGIES, reproduce
from isthmus.simulation.shapes import SHAPES, check_request, decoupled
from isthmus.spec.decoupling import default_num_groups
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.inference import CODECS, DTYPES, InferenceRequest
from isthmus.spec.serialization import to_json
from isthmus.spec.simulated import PublishedReport, SimulatedCell, SimulatedDevice, SimulateInferReport
from isthmus.spec.transformer import TransformerSpec
from isthmus.spec.units import parse_names


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What ``isthmus simulate infer`` was asked for."""

    model: str | None
    """A directory with a config.json, or one of ``SHAPES``."""
    device: str | None = None
    """Names of known devices, with commas."""
    num_devices: int | None = None
    cluster: Path | None = None
    bandwidths: tuple[float, ...] = ()
    """Mbit/s of every link. None: each device's own."""
    tokens: int = 128
    batch: int = 1
    new_tokens: int = 0
    codecs: str = "fp32"
    dtypes: str = "fp32"
    sub_blocks: int | None = None
    groups: int | None = None
    heads: str = "all"


def simulate_infer(
    options: SimulateOptions, *, report: Path | None = None, console: Console | None = None
) -> SimulateInferReport:
    """Prints every way at every bandwidth, and writes a report with a table and a picture beside it. Raises
    ``IsthmusError`` for what cannot be asked; nothing is printed or written then."""
    console = console or Console()
    spec = _spec(options)
    request = InferenceRequest(num_tokens=options.tokens, batch=options.batch, num_new_tokens=options.new_tokens)
    check_request(spec, request)
    devices = _devices(options)
    codecs = parse_names("codec", options.codecs, CODECS)
    dtypes = parse_names("dtype", options.dtypes, DTYPES)
    for bandwidth in options.bandwidths:
        if not bandwidth > 0:
            raise IsthmusError(f"bandwidths: got {bandwidth:g}, wanted Mbit/s above 0, such as 1000,125")
    cells = tuple(
        SimulatedCell(
            bits_per_s=bits_per_s,
            rows=simulate(spec, request, at_bandwidth(devices, bits_per_s), codecs=codecs, dtypes=dtypes),
        )
        for bits_per_s in [mbit * 1e6 for mbit in options.bandwidths] or [None]
    )
    found = SimulateInferReport(config=_config(options), devices=devices, cells=cells)
    by_bandwidth: Cells = {cell.bits_per_s: cell.rows for cell in cells}
    title = f"{options.model}, {_counted(devices)}, simulated"
    console.print(title, highlight=False)
    print_latency(by_bandwidth, console)
    if report is not None:
        atomic_write(report, to_json(found))
        atomic_write(report.with_suffix(".md"), _markdown(title, cells))
        plot_latency(by_bandwidth, report.with_suffix(".png"), title=title)
    return found


def _spec(options: SimulateOptions) -> TransformerSpec:
    if options.model is None:
        raise IsthmusError("model: got none, wanted a directory or the name of a shape, such as bert-base")
    if options.model in SHAPES:
        spec = SHAPES[options.model]
    elif (Path(options.model) / "config.json").is_file():
        # Only here, since it takes seconds: transformers knows what a configuration means.
        import isthmus.models.decoupled  # noqa: F401
        from isthmus.models.transformer_families import read_family

        _, _, spec = read_family(Path(options.model))
    else:
        raise IsthmusError(
            f"model: got {options.model!r}, wanted a directory with a config.json or one of {', '.join(SHAPES)}"
        )
    if options.sub_blocks is None:
        if options.groups is not None or options.heads != "all":
            raise IsthmusError("groups, heads: say how a model is decoupled; wanted --sub-blocks too")
        return spec
    groups = default_num_groups(spec.num_layers) if options.groups is None else options.groups
    return decoupled(spec, options.sub_blocks, groups, options.heads)


def _devices(options: SimulateOptions) -> tuple[SimulatedDevice, ...]:
    if (options.cluster is None) == (options.device is None):
        raise IsthmusError("device, cluster: wanted one of them; --list-devices shows those that are known by name")
    if options.cluster is not None:
        if options.num_devices is not None:
            raise IsthmusError("num_devices: is for --device; a cluster's file has a count for each of its entries")
        return read_devices(options.cluster)
    assert options.device is not None
    return devices_of([name.strip() for name in options.device.split(",")], options.num_devices)


def _config(options: SimulateOptions) -> dict[str, object]:
    cluster = None if options.cluster is None else str(options.cluster)
    return vars(options) | {"bandwidths": list(options.bandwidths), "cluster": cluster}


def _counted(devices: Sequence[SimulatedDevice]) -> str:
    """``4 × raspberry-pi-4b``, or every name where they differ."""
    runs = [(name, len(list(run))) for name, run in itertools.groupby(device.name for device in devices)]
    return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in runs)


def _markdown(title: str, cells: Sequence[SimulatedCell]) -> str:
    parts = [f"# {title}\n"]
    for cell in cells:
        if cell.bits_per_s is not None:
            parts.append(f"## {cell.bits_per_s / 1e6:g} Mbit/s\n")
        parts.append(latency_markdown(cell.rows))
    return "\n".join(parts)


def print_devices() -> None:
    """Those that are known by name."""
    columns = ("device", "GFLOP/s", "dtypes", "memory", "GB/s", "link Mbit/s", "round trip", "operator")
    table = compact_table(columns, texts=("device", "dtypes"), folding=("dtypes", "memory", "link Mbit/s"))
    for device in KINDS.values():
        table.add_row(
            device.name,
            f"{device.flops_per_s['fp32'] / 1e9:.1f}",
            ", ".join(device.flops_per_s),
            human_memory(device.memory_bytes),
            f"{device.memory_bytes_per_s / 1e9:.1f}",
            f"{device.bits_per_s / 1e6:g}" + (" shared" if device.is_wireless else ""),
            human_s(device.round_trip_s),
            human_s(device.operator_s),
        )
    Console().print(table)


def simulate_published(*, report: Path | None = None, console: Console | None = None) -> PublishedReport:
    """Prints the published table, the same simulated, and our plans beside it; writes them to ``report``."""
    console = console or Console()
    found = reproduce()
    table, lines = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False), []
    names = ["model", "Mbit/s", *STRATEGIES.values(), "ours fp32", "ours int8"]
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=name in ("model", "Mbit/s"))
    lines += [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    for cells in _published_rows(found):
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    console.print(
        "Four Raspberry Pi 4B, 128 tokens: latency by that of one device, published → simulated (deviation)",
        highlight=False,
    )
    console.print(table)
    if report is not None:
        atomic_write(report, to_json(found))
        atomic_write(report.with_suffix(".md"), "\n".join(lines) + "\n")
    return found


def _published_rows(found: PublishedReport) -> list[list[str]]:
    rows: dict[tuple[str, float], list[str]] = {}
    for figure in found.figures:
        cells = rows.setdefault((figure.model, figure.bits_per_s), [figure.model, f"{figure.bits_per_s / 1e6:g}"])
        cells.append(f"{figure.published:.2f} → {figure.simulated:.2f} ({figure.deviation:+.0%})")
    for own in found.ours:
        rows[own.model, own.bits_per_s].append(f"{own.latency_s / own.one_device_s:.2f}")
    return list(rows.values())
