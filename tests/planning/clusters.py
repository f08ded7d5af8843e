"""Clusters for tests of planning: devices of some speed on links of some rate, without noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.spec.cluster import (
    ClusterProfile,
    CodecTimes,
    DeviceProfile,
    LinkProfile,
    Transfer,
    Waiting,
    WidthTimes,
)
from isthmus.spec.profile import Curve
from isthmus.spec.transformer import TransformerSpec

BERT = TransformerSpec(
    model_type="bert",
    is_decoder=False,
    num_layers=12,
    hidden_size=768,
    num_heads=12,
    num_kv_heads=12,
    head_size=64,
    intermediate_size=3072,
    vocab_size=30522,
    max_num_tokens=512,
    activation="gelu",
    has_gate=False,
    norm="layer",
    norm_epsilon=1e-12,
    norm_first=False,
    has_rotary=False,
    num_token_types=2,
)
LLAMA = replace(
    BERT,
    model_type="llama",
    is_decoder=True,
    num_layers=2,
    num_kv_heads=4,
    intermediate_size=2048,
    has_gate=True,
    norm="rms",
    norm_first=True,
    has_rotary=True,
)
_ROWS = (1, 8, 32, 128)
_GIB = 1 << 30


def device(
    spec: TransformerSpec, flops: float, *, free_memory_bytes: int = 8 * _GIB, dtypes: Sequence[str] = ("fp32",)
) -> DeviceProfile:
    """Every product at ``flops``, half a millisecond for each block whatever its size."""

    def curve(numel: float) -> Curve:
        return Curve(num_tokens=_ROWS, seconds=tuple(5e-4 + 2 * rows * numel / flops for rows in _ROWS))

    widths = tuple(
        WidthTimes(share=share, attention=curve(share * spec.attention_numel), mlp=curve(share * spec.mlp_numel))
        for share in (1.0, 0.5, 0.25)
    )
    return DeviceProfile(
        name=f"{flops:g}",
        cpu_name="none",
        num_threads=1,
        free_memory_bytes=free_memory_bytes,
        memory_bytes_per_s=1e13,
        layers=dict.fromkeys(dtypes, widths),
        embedding=Curve(num_tokens=_ROWS, seconds=(1e-5, 1e-5, 1e-5, 1e-4)),
        s_per_score=4 * spec.head_size / flops,
        codecs={name: CodecTimes(encode_s=4e-9, decode_s=1e-9) for name in ("fp32", "bf16", "int8", "int4")},
        s_per_added_value=4e-10,
    )


def link(bytes_per_s: float, *, burst_bytes: float = 0.0, latency_s: float = 2e-4) -> LinkProfile:
    sizes = (1 << 14, 1 << 17, 1 << 20)
    return LinkProfile(
        round_trip_s=latency_s,
        latency_s=latency_s,
        message_s=1e-4,
        waiting=Waiting(computing_s=(1e-3, 1e-2), seconds=(2e-4, 1e-3)),
        sum_step_s=3e-4,
        transfer=Transfer(num_bytes=sizes, seconds=tuple(max(0.0, size - burst_bytes) / bytes_per_s for size in sizes)),
        bytes_per_s=bytes_per_s,
        burst_bytes=burst_bytes,
    )


def cluster(devices: Sequence[DeviceProfile], links: Sequence[LinkProfile]) -> ClusterProfile:
    return ClusterProfile(transport="none", model="none", devices=tuple(devices), links=tuple(links))


def even_cluster(num_devices: int, bytes_per_s: float, spec: TransformerSpec = BERT) -> ClusterProfile:
    """Devices of 24 GFLOP/s: a Raspberry Pi 4B's class."""
    return cluster([device(spec, 24e9)] * num_devices, [link(bytes_per_s)] * num_devices)
