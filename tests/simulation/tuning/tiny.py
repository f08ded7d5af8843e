"""Models and clusters whose seconds can be computed by hand.

A layer's dense part has 100 parameters and an expert 200, in FP32. Copies go at 800 bytes a second, so a dense part
takes 0.5 s and an expert 1 s in either direction. With sequences of one token the dense part takes 1 s a token, an
expert 5/3 s a token on the accelerator and 2 s on the CPU; backward takes 3 and 2 times as long. The optimizer steps
1000 parameters a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.planning.stages import map_stages
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.work import StepWork
from isthmus.spec.model import ExpertSpec, ModelSpec, TensorSpec
from isthmus.spec.tune_cluster import TuneAccelerator, TuneCluster, TuneHost


def model(num_layers: int = 1, num_experts: int = 2, dense_layers: Sequence[int] = ()) -> ModelSpec:
    expert = ExpertSpec(
        hidden_size=10,
        intermediate_size=10,
        num_experts=num_experts,
        top_k=2,
        has_gate=False,
        has_bias=False,
        is_transposed=False,
        activation="relu",
        tensors=(TensorSpec(name="up_proj", shape=(10, 10)), TensorSpec(name="down_proj", shape=(10, 10))),
    )
    return ModelSpec(
        model_type="tiny",
        architecture="Tiny",
        is_encoder_decoder=False,
        num_layers=num_layers,
        hidden_size=10,
        vocab_size=1,
        layers=tuple(None if layer in dense_layers else expert for layer in range(num_layers)),
        dense_numel=(100,) * num_layers,
        outer_numel=0,
    )


def cluster(num_accelerators: int = 1, num_hosts: int = 1, **host: Any) -> TuneCluster:
    accelerator = TuneAccelerator(
        name="card",
        memory_bytes=1 << 30,
        memory_bytes_per_s=1e12,
        flops_per_s={"fp32": 240.0},
        h2d_bytes_per_s=800.0,
        d2h_bytes_per_s=800.0,
        copy_s=0.0,
        expert_s=0.0,
    )
    fields: dict[str, Any] = {
        "name": "host",
        "count": num_hosts,
        "accelerator": accelerator,
        "num_accelerators": num_accelerators,
        "accelerators_per_root": 1,
        "root_bytes_per_s": 800.0,
        "num_cores": num_accelerators,
        "core_flops_per_s": {"fp32": 200.0},
        "memory_bytes": 1 << 30,
        "memory_bytes_per_s": 28e3 * num_accelerators,
        "network_bytes_per_s": 800.0,
        "network_s": 0.0,
    }
    return TuneCluster(name="tiny", hosts=(TuneHost(**(fields | host)),))


def work(
    spec: ModelSpec,
    on: TuneCluster,
    counts: Mapping[int, Sequence[float]],
    *,
    num_stages: int | None = None,
    micro_batches: int = 1,
    batch: int | None = None,
) -> StepWork:
    """``counts``: of a whole step; the batch is as many sequences of one token as make them."""
    tokens = batch or max(1, round(sum(next(iter(counts.values()))) / 2))
    job = TuneJob(batch=max(tokens, micro_batches), seq_len=1, num_micro_batches=micro_batches)
    costs = Costs(spec, on, job)
    stages = map_stages(spec, num_slots=0, num_stages=num_stages or costs.num_devices)
    return StepWork(costs, stages, costs.order, counts)
