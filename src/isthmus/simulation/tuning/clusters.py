"""Clusters that are known by name: APTMoE's nodes, from data sheets and the paper's own measurements.

Where each figure is from:

- NVIDIA A800 PCIe 40 GB (data sheet): 40 GB at 1.555 TB/s, 19.5 TFLOP/s in FP32.
- Intel Xeon Gold 6348 (data sheet): 28 cores at 2.6 GHz with two 512-bit FMA units, 166 GFLOP/s a core in FP32 at
  most; eight channels of DDR4-3200, 204.8 GB/s.
- Experts and loads: the table that was published with APTMoE's artifact, as straight lines between a few counts, fitted
  to medians of its rows. Its copies reach 7 to 10.5 GB/s.

Not published, and chosen once for all published figures (``docs/simulation.md`` says how): products reach
``PEAK_SHARE`` of the accelerator's peak; copies down are twice as fast as up; a root passes 30 GB/s; starting an expert
takes 0.3 ms; three quarters of the memory's rate are reached; the table is that of 14 cores, a process's part in C1+G2.
"""

from __future__ import annotations

from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.profile import Curve
from isthmus.spec.tune_cluster import MeasuredExperts, TuneAccelerator, TuneCluster, TuneHost, read_tune_cluster

PEAK_SHARE = 0.8
NUM_CORES = 28
TABLE_NUM_CORES = 14
H2D_BYTES_PER_S = 10.5e9
D2H_BYTES_PER_S = 21e9
ROOT_BYTES_PER_S = 30e9
EXPERT_S = 3e-4
TOPOLOGIES = {"a800-c1g1": 1, "a800-c1g2": 2, "a800-c1g4": 4}
"""Accelerators that share one processor of 28 cores."""
DEFAULT_NUM_DEVICES = 4

_COUNTS = (1, 16, 64, 256, 1024, 4096, 8192)
_FITTED = {
    "h1024-i4096-mlp": ((0.19e-3, 0.5e-3, 0.74e-3, 2.4e-3, 5.9e-3, 61e-3, 118e-3), 3.20e-3, 1.69e-3),
    "h2048-i8192-mlp": ((0.54e-3, 1.7e-3, 3.2e-3, 6.1e-3, 26e-3, 124e-3, 260e-3), 19.05e-3, 7.80e-3),
    "h4096-i14336-mlp": ((4.1e-3, 5.0e-3, 6.7e-3, 15e-3, 138e-3, 334e-3, 613e-3), 61.51e-3, 35.99e-3),
}


def a800(num_accelerators: int, num_devices: int = DEFAULT_NUM_DEVICES) -> TuneCluster:
    """``num_devices`` accelerators, so many at one processor. Raises ``IsthmusError`` for a number that leaves one
    with fewer."""
    if num_devices < 1 or num_devices % num_accelerators:
        raise IsthmusError(
            f"num_devices: got {num_devices}, wanted a multiple of {num_accelerators}, those of one processor"
        )
    card = TuneAccelerator(
        name="A800-40GB-PCIe",
        memory_bytes=40 << 30,
        memory_bytes_per_s=1.555e12,
        flops_per_s={"fp32": PEAK_SHARE * 19.5e12},
        h2d_bytes_per_s=H2D_BYTES_PER_S,
        d2h_bytes_per_s=D2H_BYTES_PER_S,
        expert_s=EXPERT_S,
    )
    host = TuneHost(
        name="xeon-6348",
        count=num_devices // num_accelerators,
        accelerator=card,
        num_accelerators=num_accelerators,
        accelerators_per_root=num_accelerators,
        root_bytes_per_s=ROOT_BYTES_PER_S,
        num_cores=NUM_CORES,
        core_flops_per_s={"fp32": PEAK_SHARE * 166e9},
        memory_bytes=1 << 40,
        memory_bytes_per_s=0.75 * 204.8e9,
        network_bytes_per_s=10e9,
    )
    experts = {
        shape: MeasuredExperts(
            cpu_forward=Curve(num_tokens=_COUNTS, seconds=seconds),
            num_cores=TABLE_NUM_CORES,
            load_s=load_s,
            dense_load_s=dense_load_s,
        )
        for shape, (seconds, load_s, dense_load_s) in _FITTED.items()
    }
    return TuneCluster(
        name=f"a800-c1g{num_accelerators}", hosts=(host,), experts=experts, source="APTMoE (SC 2024), data sheets"
    )


def find_cluster(name: str, num_devices: int | None = None) -> TuneCluster:
    """The cluster of this name or in this file. ``num_devices``: of a named one. Raises ``IsthmusError`` for what is
    neither, or cannot be."""
    if name in TOPOLOGIES:
        return a800(TOPOLOGIES[name], num_devices or DEFAULT_NUM_DEVICES)
    if not Path(name).suffix:
        raise IsthmusError(f"cluster: got {name!r}, wanted one of {', '.join(TOPOLOGIES)}, or a JSON file")
    if num_devices is not None:
        raise IsthmusError("num_devices: is for a named cluster; a file has num_accelerators and count for its hosts")
    return read_tune_cluster(Path(name))
