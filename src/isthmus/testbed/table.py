"""The table of a testbed: what was asked of every device beside what was measured, and whether it is alive."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from isthmus.testbed.state import TestbedState
from isthmus.testbed.testbed import DeviceStatus


def testbed_table(state: TestbedState, statuses: Sequence[DeviceStatus] = ()) -> Table:
    """One row per device. Columns of what is not known (unmeasured, no ``statuses``) are left out."""
    devices, measured = state.spec.devices, state.measured
    has_memory = any(device.memory_bytes is not None for device in devices)
    has_delay = any(device.delay_s for device in devices)
    columns: dict[str, list[str]] = {
        "device": [str(number) for number in range(len(devices))],
        "address": [state.layout.address(number) for number in range(len(devices))],
        "cores": [f"{device.cpu_share:g}" for device in devices],
        "cores got": [f"{each.cpu_share:.2f}" for each in measured],
        "FP32 GFLOP/s": [f"{each.gemm_flops / 1e9:.1f}" for each in measured],
        "memory": [_memory(device.memory_bytes) for device in devices] if has_memory else [],
        "link Mbit/s": [_mbit(device.bandwidth_bits_per_s) for device in devices],
        "host Mbit/s": [_both(each.to_host_bits_per_s, each.from_host_bits_per_s) for each in measured],
        "delay ms": [f"{device.delay_s * 1e3:g}" for device in devices] if has_delay else [],
        "round trip ms": [f"{each.round_trip_s * 1e3:.3f}" for each in measured],
        "alive, procs": [f"{_alive(status)}, {status.num_processes}" for status in statuses],
    }
    caption = None
    if measured:
        caption = (
            "cores, memory, link, delay: asked. The rest was measured one device after the other, the others idle; "
            "host: to the host, and from it where that differs."
        )
    table = Table(
        title=f"testbed {state.spec.name}, {state.subnet}",
        caption=caption,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    shown = {title: cells for title, cells in columns.items() if cells}
    for title in shown:
        table.add_column(title.replace(" ", "\n"), justify="right", overflow="fold", no_wrap=title == "address")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def _mbit(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e6:.4g}"


def _both(to_bits_per_s: float, from_bits_per_s: float) -> str:
    there, back = (_mbit(round(rate, -6)) for rate in (to_bits_per_s, from_bits_per_s))
    return there if there == back else f"{there} {back}"


def _memory(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:.3g} GiB"


def _alive(status: DeviceStatus) -> str:
    parts = {"namespace": status.has_namespace, "link": status.has_link, "control groups": status.has_groups}
    return "yes" if status.is_alive else f"no {', no '.join(part for part, is_there in parts.items() if not is_there)}"
