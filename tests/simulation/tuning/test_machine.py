"""A measured machine as a cluster: what was measured is what the simulator then takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.planning.conftest import line

from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.machine import cluster_of
from isthmus.spec.hardware import Hardware, LinkRate
from isthmus.spec.model import ExpertSpec, ModelSpec, TensorSpec
from isthmus.spec.profile import ExpertTimes, Profile

EXPERT = ExpertSpec(
    hidden_size=8,
    intermediate_size=16,
    num_experts=4,
    top_k=2,
    has_gate=True,
    has_bias=False,
    is_transposed=False,
    activation="silu_glu",
    tensors=(TensorSpec(name="gate_up_proj", shape=(32, 8)), TensorSpec(name="down_proj", shape=(8, 16))),
)
SPEC = ModelSpec(
    model_type="tiny",
    architecture="Tiny",
    is_encoder_decoder=False,
    num_layers=3,
    hidden_size=8,
    vocab_size=32,
    layers=(None, EXPERT, EXPERT),
    dense_numel=(768, 384, 384),
    outer_numel=256,
)
PROFILE = Profile(
    hardware=Hardware(
        cpu_name="cpu",
        num_cpu_threads=2,
        host_memory_bytes=1 << 30,
        accelerator="cuda",
        accelerator_name="card",
        accelerator_memory_bytes=0,
        link=LinkRate(h2d_bytes_per_s=1e6, d2h_bytes_per_s=5e5),
    ),
    dtype="fp32",
    experts={
        Profile.expert_key(8, 16, True): ExpertTimes(
            cpu_forward=line(1e-4, 1e-4),
            cpu_backward=line(2e-4, 2e-4),
            accelerator_forward=line(1e-5, 1e-5),
            accelerator_backward=line(2e-5, 2e-5),
        )
    },
    h2d_s_per_byte=1e-6,
    d2h_s_per_byte=2e-6,
    h2d_duplex_s_per_byte=1e-6,
    d2h_duplex_s_per_byte=2e-6,
    copy_latency_s=1e-5,
    copy_window=2,
    optimizer_s_per_parameter=1e-8,
    dense_forward_s_per_token=1e-6,
    dense_backward_s_per_token=2e-6,
)


def test_what_was_measured_is_what_the_simulator_takes() -> None:
    cluster = cluster_of(PROFILE, SPEC, num_tokens=32, seq_len=16, memory_bytes=1 << 20)
    assert cluster.num_accelerators == 1 and cluster.hosts[0].memory_bytes == 1 << 30
    costs = Costs(SPEC, cluster, TuneJob(batch=2, seq_len=16, num_micro_batches=1))
    layer = costs.layer(0, 1)
    assert layer.load_s == pytest.approx(1e-5 + 384 * 4 * 1e-6) and layer.unload_s == pytest.approx(384 * 4 * 2e-6)
    assert layer.optimizer_s == pytest.approx((384 + 4 * 384) * 1e-8)
    cpu_s = layer.cpu_s(np.array([1.0, 16.0, 64.0]), is_backward=False)
    assert cpu_s.tolist() == pytest.approx([2e-4, 17e-4, 65e-4])
    # A whole forward pass on the accelerator takes what was measured: three dense parts, eight experts of 16 tokens.
    forward_s = sum(costs.layer(0, number).dense_s[0] for number in range(3))
    forward_s += 8 * float(layer.accelerator_s(np.array(16.0), is_backward=False))
    assert forward_s == pytest.approx(3 * 32e-6 + 8 * 17e-5, rel=0.02)


def test_a_machine_without_an_accelerator_is_one_whose_link_takes_no_time() -> None:
    here = replace(PROFILE, hardware=replace(PROFILE.hardware, link=None), h2d_s_per_byte=0.0, d2h_s_per_byte=0.0)
    cluster = cluster_of(here, SPEC, num_tokens=32, seq_len=16, memory_bytes=1 << 20)
    layer = Costs(SPEC, cluster, TuneJob(batch=2, seq_len=16, num_micro_batches=1)).layer(0, 1)
    assert layer.load_s == pytest.approx(1e-5) and layer.row_h2d_s == pytest.approx(0.0)


def test_processes_have_what_was_measured_of_one_each() -> None:
    cluster = cluster_of(PROFILE, SPEC, num_tokens=32, seq_len=16, memory_bytes=1 << 20, num_processes=2)
    assert cluster.num_accelerators == 2
    alone = cluster_of(PROFILE, SPEC, num_tokens=32, seq_len=16, memory_bytes=1 << 20)
    job = TuneJob(batch=2, seq_len=16, num_micro_batches=1)
    one, of_two = (Costs(SPEC, which, job).layer(0, 1) for which in (alone, cluster))
    tokens = np.array([1.0, 16.0])
    for backward in (False, True):
        assert one.cpu_s(tokens, is_backward=backward) == pytest.approx(of_two.cpu_s(tokens, is_backward=backward))
    assert one.optimizer_s == pytest.approx(of_two.optimizer_s)
