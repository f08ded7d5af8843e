"""Fixtures of the planning tests: a small model and a profile with straight-line curves."""

from __future__ import annotations

import pytest

from isthmus.spec.hardware import Hardware
from isthmus.spec.model import ExpertSpec, ModelSpec, TensorSpec
from isthmus.spec.profile import Curve, ExpertTimes, Profile


@pytest.fixture
def expert() -> ExpertSpec:
    return ExpertSpec(
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


@pytest.fixture
def spec(expert: ExpertSpec) -> ModelSpec:
    """Six layers, the first of them dense."""
    return ModelSpec(
        model_type="tiny",
        architecture="Tiny",
        is_encoder_decoder=False,
        num_layers=6,
        hidden_size=8,
        vocab_size=32,
        layers=(None, *[expert] * 5),
        dense_numel=(1536 + 384, *[384] * 5),
        outer_numel=256,
    )


def line(base_s: float, s_per_token: float) -> Curve:
    return Curve(num_tokens=(1, 64), seconds=(base_s + s_per_token, base_s + 64 * s_per_token))


@pytest.fixture
def profile() -> Profile:
    """CPU 10 times as slow as the accelerator, backward twice forward; loading an expert (1536 bytes) takes 1.5 ms."""
    return Profile(
        hardware=Hardware(
            cpu_name="cpu",
            num_cpu_threads=2,
            host_memory_bytes=1 << 30,
            accelerator="emulated",
            accelerator_name="emulated",
            accelerator_memory_bytes=1 << 20,
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
        d2h_s_per_byte=1e-6,
        h2d_duplex_s_per_byte=2e-6,
        d2h_duplex_s_per_byte=1.5e-6,
        copy_latency_s=1e-5,
        copy_window=2,
        optimizer_s_per_parameter=1e-8,
        dense_forward_s_per_token=1e-6,
        dense_backward_s_per_token=2e-6,
    )
