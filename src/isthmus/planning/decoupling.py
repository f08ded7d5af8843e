"""What decoupling a Transformer would gain on several devices, by arithmetic alone: nothing is measured or trained.

Each of N devices holds one sub-block of every decoupled layer and all original layers (plan BP+Allgather,
DeTransformer, DATE 2024, section IV): before an original layer the slices are gathered, which is all that is sent. The
times are bounds: computing at a device's rate, bytes at the link's, no latency, no start-up. Matrices and attention
scores are counted, two operations a multiplication; embeddings, norms and heads are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.spec.decoupling import original_layers_of
from isthmus.spec.transformer import TransformerSpec

VALUE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class DecouplingGain:
    """One form, run on as many devices as it has sub-blocks. Times are relative to the original on one device."""

    num_sub_blocks: int
    original_layers: tuple[int, ...]
    num_exchanges: int
    """All-gathers of one request; tensor parallelism has two all-reduces a layer."""
    sent_bytes: int
    """By each device, for one request."""
    tensor_parallel_sent_bytes: int
    """By each device, were the original divided by heads instead (two-step all-reduces)."""
    operations_ratio: float
    """Of the whole decoupled model on one device, by the original's: attention scores are there once a sub-block."""
    weight_ratio: float
    """Of one device's layers, by the whole original's."""
    time_ratios: tuple[float, ...]
    """By bandwidth, in the order asked."""


def forms(num_layers: int, hidden_size: int) -> list[tuple[int, tuple[int, ...]]]:
    """(sub-blocks, original layers) worth weighing: 2, 4 and 8 sub-blocks that divide the hidden size, one original
    layer in two, in three, in four, and only the last."""
    found = []
    for num_sub_blocks in (2, 4, 8):
        if hidden_size % num_sub_blocks:
            continue
        counts = {num_layers // every for every in (2, 3, 4)} | {1}
        for num_groups in sorted((count for count in counts if 0 < count < num_layers), reverse=True):
            found.append((num_sub_blocks, original_layers_of(num_layers, num_groups)))
    return found


def gain_of(
    spec: TransformerSpec,
    num_sub_blocks: int,
    original_layers: Sequence[int],
    *,
    tokens: int,
    operations_per_s: float,
    bandwidths_bytes_per_s: Sequence[float],
) -> DecouplingGain:
    """What the form gains for a request of ``tokens`` tokens on devices that do ``operations_per_s``."""
    num, num_originals = num_sub_blocks, len(original_layers)
    num_decoupled = spec.num_layers - num_originals
    matrices = 2 * tokens * (spec.attention_numel + spec.mlp_numel)
    scores = 4 * tokens * tokens * spec.num_heads * spec.head_size // (2 if spec.is_decoder else 1)
    original = spec.num_layers * (matrices + scores)
    decoupled = num_originals * (matrices + scores) + num_decoupled * (matrices + num * scores)
    per_device = num_originals * (matrices + scores) + num_decoupled * (matrices / num + scores)
    # The first original layer finds all slices there if no decoupled one came before; the last slices are gathered too.
    gathers = _gathers(spec.num_layers, original_layers)
    slice_bytes = tokens * spec.hidden_size * VALUE_BYTES // num
    sent_bytes = gathers * slice_bytes * (num - 1)
    whole_s = original / operations_per_s
    return DecouplingGain(
        num_sub_blocks=num,
        original_layers=tuple(original_layers),
        num_exchanges=gathers,
        sent_bytes=sent_bytes,
        tensor_parallel_sent_bytes=2 * spec.num_layers * 2 * slice_bytes * (num - 1),
        operations_ratio=decoupled / original,
        weight_ratio=(num_originals + num_decoupled / num) / spec.num_layers,
        time_ratios=tuple(
            (per_device / operations_per_s + sent_bytes / bandwidth) / whole_s for bandwidth in bandwidths_bytes_per_s
        ),
    )


def _gathers(num_layers: int, original_layers: Sequence[int]) -> int:
    """Times that slices are gathered: before an original layer that follows a decoupled one, and at the end where the
    last layer is decoupled."""
    originals = set(original_layers)
    return sum(
        layer not in originals and (layer + 1 in originals or layer + 1 == num_layers) for layer in range(num_layers)
    )
