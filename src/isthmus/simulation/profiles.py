"""What would be measured on devices, from a few figures of each: the profile that plans are made from.

A product of R rows with a matrix of E values takes the longer of 2·R·E operations at the device's rate and of reading
the matrix once; what is done value by value takes its bytes at the memory's rate; every operator takes a time to start.
Devices do not wait for one another beyond that, and nothing else runs on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.planning.device_costs import ADDED_TOUCHED, HIDDEN_TOUCHED, INNER_TOUCHED, PROCESS_BYTES, WEIGHT_BYTES
from isthmus.spec.cluster import (
    ClusterProfile,
    CodecTimes,
    DeviceProfile,
    LinkProfile,
    Transfer,
    Waiting,
    WidthTimes,
)
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import CODECS
from isthmus.spec.profile import Curve
from isthmus.spec.simulated import SimulatedDevice
from isthmus.spec.transformer import TransformerSpec

SYSTEM_BYTES = 300 << 20
"""What the operating system keeps."""
_SHARES = (1.0, 0.5, 0.25, 0.0625)
_ROWS = tuple(1 << power for power in range(14))
_OPERATORS = 6
"""Of PyTorch in a layer's attention, and as many in its MLP."""
_NATIVE_ROWS = 4
"""Up to so many rows a decoder's block is one call."""
_SCORE_BYTES = 16
"""Of a score: written, read and written by the softmax, read, 4 bytes each."""
_ENCODED_BYTES, _DECODED_BYTES = 24, 8
"""Of memory by value that is encoded or decoded."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """What carries messages. An exchange takes ``exchange_s``, and ``message_s`` for each message of a device."""

    exchange_s: float
    message_s: float
    link_share: float
    """Of a cable's rate, that arrives as payload."""


SOCKETS = Transport(exchange_s=6e-5, message_s=1.5e-5, link_share=0.94)
"""Ours. Of a sum of few values on emulated devices of this class 58 µs were measured, of two messages sent and two
received; TCP's payload is 1448 of the 1538 bytes that a full packet occupies a cable for."""


def cluster_profile(
    devices: Sequence[SimulatedDevice], spec: TransformerSpec, dtypes: Sequence[str], transport: Transport = SOCKETS
) -> ClusterProfile:
    """What ``devices`` would be measured to need for the layers of ``spec``. Raises ``IsthmusError`` for a dtype that
    one of them does not have."""
    return ClusterProfile(
        transport="simulated",
        model=spec.model_type,
        devices=tuple(_device_profile(device, spec, dtypes) for device in devices),
        links=tuple(_link_profile(device, spec, transport, len(devices)) for device in devices),
    )


def _device_profile(device: SimulatedDevice, spec: TransformerSpec, dtypes: Sequence[str]) -> DeviceProfile:
    flops_per_s = _rates(device, dtypes)
    s_per_byte = 1 / device.memory_bytes_per_s
    form = spec.decoupling
    embedding = [3 * device.operator_s + rows * 24 * spec.hidden_size * s_per_byte for rows in _ROWS]
    return DeviceProfile(
        name=device.name,
        cpu_name=device.name,
        num_threads=1,
        free_memory_bytes=max(0, device.memory_bytes - SYSTEM_BYTES - PROCESS_BYTES),
        memory_bytes_per_s=device.memory_bytes_per_s,
        layers={
            dtype: tuple(
                WidthTimes(
                    share=share,
                    attention=_block(device, spec, dtype, share * spec.attention_numel, share * spec.attention_columns),
                    mlp=_block(device, spec, dtype, share * spec.mlp_numel, share * spec.mlp_columns),
                )
                for share in _SHARES
            )
            for dtype in dtypes
        },
        sub_block={} if form is None else {dtype: _sub_block(device, spec, dtype) for dtype in dtypes},
        embedding=Curve(num_tokens=_ROWS, seconds=tuple(embedding)),
        s_per_score=4 * spec.head_size / max(flops_per_s) + _SCORE_BYTES * s_per_byte,
        codecs={
            codec: CodecTimes(encode_s=0.0, decode_s=0.0)
            if codec == "fp32"
            else CodecTimes(encode_s=_ENCODED_BYTES * s_per_byte, decode_s=_DECODED_BYTES * s_per_byte)
            for codec in CODECS
        },
        s_per_added_value=4 * ADDED_TOUCHED * s_per_byte,
    )


def _rates(device: SimulatedDevice, dtypes: Sequence[str]) -> list[float]:
    if missing := [dtype for dtype in dtypes if dtype not in device.flops_per_s]:
        raise IsthmusError(f"dtype: {device.name} has no {missing[0]}, wanted one of {', '.join(device.flops_per_s)}")
    return [device.flops_per_s[dtype] for dtype in dtypes]


def _sub_block(device: SimulatedDevice, spec: TransformerSpec, dtype: str) -> WidthTimes:
    """The first one. With heads of its own its attention's matrices are as many times smaller again."""
    block = spec.sub_block(0)
    share, heads = len(block.units) / spec.hidden_size, len(block.heads) / spec.num_heads
    return WidthTimes(
        share=share,
        attention=_block(
            device, spec, dtype, share * heads * spec.attention_numel, heads * spec.attention_columns, share
        ),
        mlp=_block(device, spec, dtype, share * spec.mlp_numel, spec.mlp_columns, share),
    )


def _block(
    device: SimulatedDevice, spec: TransformerSpec, dtype: str, numel: float, inner: float, outer: float = 1.0
) -> Curve:
    """Seconds by rows of matrices of ``numel`` values, with ``inner`` columns between them; ``outer`` of the hidden
    units are read and written."""
    reading_s = numel * WEIGHT_BYTES[dtype] / device.memory_bytes_per_s
    row_s = 2 * numel / device.flops_per_s[dtype]
    touched = HIDDEN_TOUCHED * outer * spec.hidden_size + INNER_TOUCHED * inner
    value_s = 4 * touched / device.memory_bytes_per_s
    seconds = []
    for rows in _ROWS:
        operators = 1 if spec.is_decoder and rows <= _NATIVE_ROWS else _OPERATORS
        seconds.append(operators * device.operator_s + max(reading_s, rows * row_s) + rows * value_s)
    return Curve(num_tokens=_ROWS, seconds=tuple(seconds))


def _link_profile(
    device: SimulatedDevice, spec: TransformerSpec, transport: Transport, num_devices: int
) -> LinkProfile:
    """Of a device on Wi-Fi the rate is that of payload, and of the medium: each byte out or in occupies it. Repeated
    sums are of one token: to one other device a step, or all at once where devices are no power of two."""
    bytes_per_s = device.bits_per_s / 8 * (1.0 if device.is_wireless else transport.link_share)
    latency_s = transport.exchange_s + device.round_trip_s / 2
    num_messages = num_devices - 1 if num_devices & (num_devices - 1) else 1
    return LinkProfile(
        round_trip_s=device.round_trip_s,
        latency_s=latency_s,
        message_s=transport.message_s,
        waiting=Waiting(computing_s=(1.0,), seconds=(0.0,)),
        sum_step_s=latency_s + num_messages * (transport.message_s + 4 * spec.hidden_size / bytes_per_s),
        transfer=Transfer(num_bytes=(1 << 20,), seconds=((1 << 20) / bytes_per_s,)),
        bytes_per_s=bytes_per_s,
        airtime_s_per_byte=1 / bytes_per_s if device.is_wireless else 0.0,
    )
