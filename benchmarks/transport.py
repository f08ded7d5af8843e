"""Exchanges between devices: our TCP groups and gloo, all-reduce and all-gather from 1 KiB to 4 MiB.

Started plainly it makes ``--processes`` ranks on this host. With RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the
environment (one process per device, as torchrun or a testbed starts them) it is one of the ranks. The bound is the
bytes that the algorithm sends from a device at ``--link`` bytes per second, without latency (where a link's rate is
given). Variants run in turns, so noise meets all alike.

``sockets`` and ``gloo`` are two implementations of the same seam; ``gloo-native`` is gloo's own collective, which sums
in another order. ``cpu`` is the time that the process itself worked per call, its other threads included.

    python benchmarks/transport.py [--processes 4] [--repetitions 30] [--link 125MB/s] [--sizes 1KiB,64KiB]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from isthmus.spec.units import parse_bytes, parse_rate
from isthmus.transport.base import Algorithm, Group
from isthmus.transport.gloo import GlooGroup
from isthmus.transport.rendezvous import held_port
from isthmus.transport.sockets import SocketGroup

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIZES = "1KiB,4KiB,12KiB,64KiB,256KiB,1MiB,4MiB"
# (implementation, collective, algorithm, codec)
VARIANTS: list[tuple[str, str, Algorithm, str | None]] = [
    ("sockets", "all_reduce", "mesh", None),
    ("sockets", "all_reduce", "two_step", None),
    ("sockets", "all_reduce", "ring", None),
    ("sockets", "all_reduce", "mesh", "int8"),
    ("sockets", "all_reduce", "two_step", "int8"),
    ("gloo", "all_reduce", "mesh", None),
    ("gloo-native", "all_reduce", "ring", None),
    ("sockets", "all_gather", "mesh", None),
    ("sockets", "all_gather", "mesh", "int8"),
    ("gloo", "all_gather", "mesh", None),
    ("gloo-native", "all_gather", "ring", None),
]


def make_call(
    groups: dict[str, Group],
    implementation: str,
    collective: str,
    algorithm: Algorithm,
    codec: str | None,
    num_bytes: int,
) -> Callable[[], None]:
    """One variant's call on ``num_bytes`` of FP32: the whole of what is reduced, or what each rank gives to the
    all-gather."""
    tensor = torch.ones(num_bytes // 4)
    outputs = [torch.empty(num_bytes // 4) for _ in range(groups["sockets"].world_size)]
    if implementation == "gloo-native":
        assert isinstance(groups["gloo"], GlooGroup)
        native: Any = groups["gloo"].process_group
        if collective == "all_reduce":
            return lambda: native.allreduce([tensor]).wait()
        return lambda: native.allgather([outputs], [tensor]).wait()
    group = groups[implementation]
    if collective == "all_reduce":
        return lambda: group.all_reduce(tensor, codec=codec, algorithm=algorithm)
    return lambda: group.all_gather(outputs, tensor, codec=codec, algorithm=algorithm)


def sent_bytes(groups: dict[str, Group], variant: tuple[str, str, Algorithm, str | None], num_bytes: int) -> int:
    """Bytes that a rank sends. gloo's own are a ring's."""
    _, collective, algorithm, codec = variant
    size = groups["sockets"].world_size
    encoded = groups["sockets"].codec(codec).num_bytes(num_bytes // 4) if codec else num_bytes
    if collective == "all_reduce" and algorithm != "mesh":
        return 2 * encoded * (size - 1) // size
    return encoded * (size - 1)


def spread_ms(times_s: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times_s, n=10)
    return {name: round(deciles[i] * 1e3, 4) for name, i in (("p10", 0), ("median", 4), ("p90", 8))}


def measure(groups: dict[str, Group], num_bytes: int, repetitions: int, link_bytes_per_s: float | None) -> list[dict]:
    calls = [make_call(groups, *variant, num_bytes) for variant in VARIANTS]
    times: list[list[float]] = [[] for _ in VARIANTS]
    cpu_times: list[list[float]] = [[] for _ in VARIANTS]
    for turn in range(repetitions + 2):
        for index, call in enumerate(calls):
            groups["sockets"].all_reduce(torch.zeros(1))  # all start together
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            call()
            if turn >= 2:
                times[index].append(time.perf_counter() - start_s)
                cpu_times[index].append(time.process_time() - start_cpu_s)
    rows = []
    for variant, times_s, cpu_s in zip(VARIANTS, times, cpu_times, strict=True):
        sent = sent_bytes(groups, variant, num_bytes)
        row: dict[str, Any] = dict(zip(("implementation", "collective", "algorithm", "codec"), variant, strict=True))
        row |= {"num_bytes": num_bytes, "sent_bytes": sent, "ms": spread_ms(times_s), "cpu_ms": spread_ms(cpu_s)}
        if link_bytes_per_s:
            row["bound_ms"] = round(sent / link_bytes_per_s * 1e3, 4)
            row["bound_share"] = round(sent / link_bytes_per_s * 1e3 / row["ms"]["median"], 3)
        rows.append(row)
    return rows


def report(rows: list[dict]) -> None:
    print(f"{rows[0]['num_bytes']} bytes")
    for row in rows:
        name = f"{row['collective']} {row['implementation']} {row['algorithm']} {row['codec'] or ''}"
        bound = f"bound {row['bound_ms']:8.3f} ms" if "bound_ms" in row else ""
        share = f" = {row['bound_share']:.0%} of the bound" if "bound_ms" in row else ""
        ms, cpu = row["ms"], row["cpu_ms"]
        spread = f"[{ms['p10']:.3f}, {ms['p90']:.3f}]"
        print(f"  {name:36} {bound}  {ms['median']:9.3f} ms {spread}  cpu {cpu['median']:.3f} ms{share}")


def run_rank(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = []
    with SocketGroup.from_environment() as sockets:
        # gloo meets at a port that rank 0 finds free now.
        port = torch.zeros(1, dtype=torch.int64)
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        listener = socket.create_server((address, 0)) if sockets.rank == 0 else None
        if listener is not None:
            port[0] = listener.getsockname()[1]
        sockets.broadcast(port)
        with GlooGroup.connect(
            rank=sockets.rank, world_size=sockets.world_size, address=address, port=int(port), listener=listener
        ) as gloo:
            for num_bytes in map(parse_bytes, arguments.sizes.split(",")):
                link = parse_rate(arguments.link) if arguments.link else None
                rows += measure({"sockets": sockets, "gloo": gloo}, num_bytes, arguments.repetitions, link)
                if sockets.rank == 0:
                    report(rows[-len(VARIANTS) :])
        if sockets.rank == 0:
            environment = {"machine": platform.machine(), "torch": torch.__version__, "num_ranks": sockets.world_size}
            print(json.dumps({"benchmark": "transport", "environment": environment, "rows": rows}), flush=True)


def run_all(num_processes: int) -> None:
    """Starts the ranks as processes of this host, with this command's arguments."""
    processes = []
    with held_port() as port:
        try:
            for rank in range(num_processes):
                values = dict(zip(VARIABLES, map(str, (rank, num_processes, "127.0.0.1", port)), strict=True))
                processes.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | values))
            if any(process.wait() for process in processes):
                raise SystemExit("a rank has failed")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--link", help="rate of every device's link, such as 15.6MB/s, for the bound")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
    else:
        run_all(arguments.processes)


if __name__ == "__main__":
    main()
