"""What every block of a model takes on every device of a cluster, from figures instead of measurements.

Legend: ``E`` experts of a layer, ``L`` MoE layers. Seconds are those of one micro-batch unless something else is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.alike import AlikeLayers
from isthmus.planning.curves import evaluate, scale
from isthmus.planning.mapping import device_order
from isthmus.planning.memory import FP32_BYTES
from isthmus.planning.problem import BYTES_PER_VALUE, LayerProblem
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ExpertSpec, ModelSpec
from isthmus.spec.profile import Curve, Profile
from isthmus.spec.tune_cluster import MeasuredExperts, TuneCluster, TuneHost

Floats = NDArray[np.float64]

ACCELERATOR_BACKWARD = 3.0
"""Of forward's seconds: what forward computed once more, then gradients of inputs and of weights (8/6 of 6·P·n
operations in all)."""
CPU_BACKWARD = 2.0
"""On the CPU what forward computed is kept."""
ADAM_BYTES_PER_PARAMETER = 28
"""Weight, gradient and two moments read, weight and two moments written, in FP32."""


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """What a step trains on, and how."""

    dtype: str = "fp32"
    batch: int
    """Sequences of a step."""
    seq_len: int
    num_micro_batches: int
    num_stages: int | None = None
    """None: two for each accelerator, or more where memory asks for it."""
    copy_window: int = 2
    predictor_accuracy: float = 0.85
    """Share of tokens of which the next layer's experts are predicted right (inter-layer phase)."""
    has_optimizer: bool = True
    """Or gradients are only added up, for others to come."""

    @property
    def num_tokens(self) -> int:
        return self.batch * self.seq_len

    def part(self, num_micro_batches: int) -> TuneJob:
        """The same with fewer micro-batches of the same size."""
        batch = self.batch * num_micro_batches // self.num_micro_batches
        return replace(self, batch=batch, num_micro_batches=num_micro_batches)

    def __post_init__(self) -> None:
        for name in ("batch", "seq_len", "num_micro_batches", "copy_window"):
            if getattr(self, name) < 1:
                raise IsthmusError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        if self.dtype not in BYTES_PER_VALUE:
            raise IsthmusError(f"dtype: got {self.dtype!r}, wanted one of {', '.join(BYTES_PER_VALUE)}")
        if self.num_micro_batches > self.batch:
            raise IsthmusError(
                f"micro_batches: got {self.num_micro_batches} of {self.batch} sequences, wanted one or more in "
                "each; raise --batch or lower --micro-batches"
            )
        if not 0 <= self.predictor_accuracy <= 1:
            raise IsthmusError(f"predictor_accuracy: got {self.predictor_accuracy}, wanted 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One accelerator's place: its host, its number there, its root, and its process's part of the host."""

    device: int
    host: TuneHost
    host_number: int
    """Of all hosts."""
    root: int
    """Of all roots."""

    @property
    def share(self) -> float:
        """Of the host's cores and memory bandwidth."""
        return 1 / self.host.num_accelerators


def seats(cluster: TuneCluster) -> tuple[Seat, ...]:
    """All accelerators, in the cluster's order."""
    found: list[Seat] = []
    host_number = root = 0
    for host in cluster.hosts:
        for _ in range(host.count):
            for number in range(host.num_accelerators):
                at = root + number // host.accelerators_per_root
                found.append(Seat(device=len(found), host=host, host_number=host_number, root=at))
            host_number += 1
            root += host.num_accelerators // host.accelerators_per_root
    return tuple(found)


class LayerCosts:
    """One layer on one device: seconds and bytes that do not depend on where tokens go, and functions of tokens."""

    def __init__(self, spec: ModelSpec, layer: int, job: TuneJob, seat: Seat, measured: MeasuredExperts | None) -> None:
        host, card = seat.host, seat.host.accelerator
        value_bytes = BYTES_PER_VALUE[job.dtype]
        self.expert = spec.layers[layer]
        self.num_tokens = job.num_tokens / job.num_micro_batches
        self.num_parts = job.num_micro_batches
        self._has_optimizer = job.has_optimizer
        flops_per_s = _rate(card.flops_per_s, job.dtype, card.name)
        numel = spec.dense_numel[layer]
        scores = 4 * self.num_tokens * job.seq_len * spec.hidden_size
        dense_s = (2 * numel * self.num_tokens + scores) / flops_per_s
        self.dense_s = (dense_s, ACCELERATOR_BACKWARD * dense_s)
        self.dense_bytes = numel * value_bytes
        rate = card.h2d_bytes_per_s
        self.dense_load_s = card.copy_s + self.dense_bytes / rate
        self.num_parameters = numel
        self.row_bytes = spec.hidden_size * value_bytes
        self.row_h2d_s, self.row_d2h_s = self.row_bytes / rate, self.row_bytes / card.d2h_bytes_per_s
        self.copy_s = card.copy_s
        self._accelerator_bytes_per_s = card.memory_bytes_per_s
        self.expert_bytes, self.load_s, self.unload_s = 0, 0.0, 0.0
        self.dense_unload_s = self.dense_bytes / card.d2h_bytes_per_s
        self.optimizer_bytes_per_s = host.memory_bytes_per_s * seat.share
        if self.expert is not None:
            self._experts(self.expert, job, seat, measured, flops_per_s, value_bytes)

    def _experts(
        self,
        expert: ExpertSpec,
        job: TuneJob,
        seat: Seat,
        measured: MeasuredExperts | None,
        flops_per_s: float,
        value_bytes: int,
    ) -> None:
        host, card = seat.host, seat.host.accelerator
        self.expert_bytes = expert.numel * value_bytes
        self.load_s = card.copy_s + self.expert_bytes / card.h2d_bytes_per_s
        if measured is not None and measured.load_s is not None:
            self.load_s = measured.load_s
        if measured is not None and measured.dense_load_s is not None:
            self.dense_load_s = measured.dense_load_s
        # What holds back copies up holds back copies down: pageable memory, a narrow link.
        slower = self.load_s / (card.copy_s + self.expert_bytes / card.h2d_bytes_per_s)
        self.unload_s = slower * self.expert_bytes / card.d2h_bytes_per_s
        self.dense_unload_s *= slower
        self.num_parameters += expert.num_experts * expert.numel
        self._accelerator_s_per_token = expert.forward_flops_per_token / flops_per_s
        self._accelerator_least_s = card.expert_s + self.expert_bytes / card.memory_bytes_per_s
        self._reading_s = self.expert_bytes / (host.memory_bytes_per_s * seat.share)
        cores = host.num_cores * seat.share
        if measured is not None:
            self._cpu = scale(measured.cpu_forward, measured.num_cores / cores)
        else:
            s_per_token = expert.forward_flops_per_token / (
                cores * _rate(host.core_flops_per_s, job.dtype, f"{host.name}'s cores")
            )
            self._cpu = Curve(num_tokens=(1, 1024), seconds=(s_per_token, 1024 * s_per_token))

    def accelerator_s(self, tokens: Floats, *, is_backward: bool) -> Floats:
        """Seconds of experts that get ``tokens`` (any shape), likewise below."""
        forward = np.maximum(self._accelerator_least_s, tokens * self._accelerator_s_per_token)
        return np.where(tokens > 0, forward * (ACCELERATOR_BACKWARD if is_backward else 1.0), 0.0)

    def cpu_s(self, tokens: Floats, *, is_backward: bool) -> Floats:
        forward = np.where(tokens > 0, np.maximum(self._reading_s, evaluate(self._cpu, tokens)), 0.0)
        return forward * (CPU_BACKWARD if is_backward else 1.0)

    def load(self, piece_bytes: int, *, is_expert: bool) -> tuple[float, int, float]:
        """(seconds, bytes, seconds of a piece) of an expert's weights or the dense part's; 0 ``piece_bytes``: whole."""
        seconds, num_bytes = (self.load_s, self.expert_bytes) if is_expert else (self.dense_load_s, self.dense_bytes)
        return seconds, num_bytes, seconds / num_pieces(num_bytes, piece_bytes)

    @property
    def resident_optimizer_s(self) -> float:
        """Likewise on the accelerator, where everything stays there."""
        return self.num_parameters * ADAM_BYTES_PER_PARAMETER / self._accelerator_bytes_per_s

    @property
    def optimizer_s(self) -> float:
        """Of all parameters of the layer, on the process's part of the memory bandwidth."""
        seconds = self.num_parameters * ADAM_BYTES_PER_PARAMETER / self.optimizer_bytes_per_s
        return seconds if self._has_optimizer else 0.0

    def problem(self, counts_E: Sequence[float], *, is_backward: bool) -> LayerProblem:
        """The layer of a whole step as the split rules see it: all micro-batches, nothing there yet."""
        layers = self.alike([counts_E], is_backward=is_backward)
        return LayerProblem(
            counts=tuple([round(count) for count in counts_E]),
            cpu_s=tuple(layers.cpu_s_LE[0].tolist()),
            accelerator_s=tuple(layers.accelerator_s_LE[0].tolist()),
            load_s=layers.load_s,
            unload_s=layers.unload_s,
            token_h2d_s=layers.token_h2d_s,
            token_d2h_s=layers.token_d2h_s,
            dense_s=layers.dense_s,
            dense_load_s=layers.dense_load_s,
            max_on_accelerator=len(counts_E),
        )

    def alike(self, counts_LE: Sequence[Sequence[float]], *, is_backward: bool) -> AlikeLayers:
        """Likewise of several layers with these costs."""
        num_parts, counts = self.num_parts, np.asarray(counts_LE, dtype=np.float64)
        return AlikeLayers(
            counts_LE=np.rint(counts),
            cpu_s_LE=num_parts * self.cpu_s(counts / num_parts, is_backward=is_backward),
            accelerator_s_LE=num_parts * self.accelerator_s(counts / num_parts, is_backward=is_backward),
            load_s=self.load_s,
            unload_s=self.unload_s if is_backward else 0.0,
            token_h2d_s=self.row_h2d_s,
            token_d2h_s=self.row_d2h_s * (2 if is_backward else 1),
            dense_s=num_parts * self.dense_s[is_backward],
            dense_load_s=self.dense_load_s,
        )


def num_pieces(num_bytes: int, piece_bytes: int) -> int:
    """In which a unit is copied; 0 ``piece_bytes``: whole."""
    return max(1, ceil(num_bytes / piece_bytes)) if piece_bytes else 1


class Costs:
    """Of every layer on every device. Layers and devices that are alike share their costs."""

    def __init__(self, spec: ModelSpec, cluster: TuneCluster, job: TuneJob) -> None:
        """Raises ``IsthmusError`` for a dtype that a device has no rate for."""
        self.spec = spec
        self.job = job
        self.cluster = cluster
        self.seats = seats(cluster)
        self.order = tuple(device_order([(seat.host_number, seat.root) for seat in self.seats]))
        """Of devices, in which stages go round."""
        self._numel = [spec.layer_numel(layer) for layer in range(spec.num_layers)]
        self._known: dict[object, LayerCosts] = {}
        self._of: dict[tuple[int, int], LayerCosts] = {}

    @property
    def host_memory_bytes(self) -> tuple[int, ...]:
        """Of each host."""
        return tuple({seat.host_number: seat.host.memory_bytes for seat in self.seats}.values())

    def layer(self, device: int, layer: int) -> LayerCosts:
        at = (device, layer)
        if at not in self._of:
            self._of[at] = self._layer(device, layer)
        return self._of[at]

    def _layer(self, device: int, layer: int) -> LayerCosts:
        seat, expert = self.seats[device], self.spec.layers[layer]
        key = (id(seat.host), expert, self.spec.dense_numel[layer])
        if key not in self._known:
            measured = None
            if expert is not None:
                shape = Profile.expert_key(expert.hidden_size, expert.intermediate_size, expert.has_gate)
                measured = self.cluster.experts.get(shape)
            self._known[key] = LayerCosts(self.spec, layer, self.job, seat, measured)
        return self._known[key]

    @property
    def num_devices(self) -> int:
        return len(self.seats)

    def activation_bytes(self, num_layers: int) -> int:
        """Of one device: inputs of every layer of a stage and every micro-batch, one layer's inner values of one."""
        job, spec = self.job, self.spec
        tokens = job.num_tokens / job.num_micro_batches
        widest = max((e.top_k * (2 * e.intermediate_size + e.hidden_size) for e in spec.layers if e), default=0)
        kept = num_layers * job.num_tokens * spec.hidden_size
        return int((kept + tokens * (8 * spec.hidden_size + widest)) * BYTES_PER_VALUE[job.dtype])

    def stage_bytes(self, first: int, last: int) -> int:
        """Weights of layers ``first`` … ``last``."""
        value_bytes = BYTES_PER_VALUE[self.job.dtype]
        return sum(self._numel[first : last + 1]) * value_bytes

    def numel(self, layer: int) -> int:
        return self._numel[layer]

    def host_bytes(self) -> int:
        """Of all hosts together: weights, gradients and Adam's moments, and FP32 masters of another dtype's weights."""
        value_bytes = BYTES_PER_VALUE[self.job.dtype]
        masters = 0 if self.job.dtype == "fp32" else FP32_BYTES
        return self.spec.num_parameters * (2 * value_bytes + masters + 2 * FP32_BYTES)


def _rate(flops_per_s: dict[str, float], dtype: str, name: str) -> float:
    if dtype not in flops_per_s:
        raise IsthmusError(
            f"dtype: got {dtype!r}, but {name} has a rate for {', '.join(flops_per_s)} only; add it to flops_per_s in "
            "the cluster's file, or take another dtype"
        )
    return flops_per_s[dtype]
