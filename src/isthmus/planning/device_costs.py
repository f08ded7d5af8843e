"""Seconds and bytes of one device: what it needs for a ``Work`` by its profile, at the least, and in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from isthmus.planning.curves import evaluate
from isthmus.planning.exchanges import Traffic
from isthmus.planning.steps import Work
from isthmus.spec.cluster import DeviceProfile, LinkProfile, WidthTimes
from isthmus.spec.inference import InferenceRequest
from isthmus.spec.profile import Curve
from isthmus.spec.transformer import LayerShare, SubBlock, TransformerSpec

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
PROCESS_BYTES = 450 << 20
"""What a device's process takes before it has read any weights: Python, PyTorch, transformers."""

HIDDEN_TOUCHED = 6
"""Values by row and hidden unit that residual and norm of a block read and write."""
INNER_TOUCHED = 4
"""By row and column between its matrices: written by a product, read and written by what follows, read by the next
product."""
ADDED_TOUCHED = 3
"""By value that is added to another."""


@dataclass(kw_only=True)
class DeviceCosts:
    """One device under one dtype. ``factor``: its seconds as a part of the profile's."""

    profile: DeviceProfile
    link: LinkProfile
    spec: TransformerSpec
    dtype: str
    factor: float = 1.0
    _seconds: dict[tuple[str, int, float], float] = field(default_factory=dict, repr=False)
    """What was evaluated before, whatever the factor; and the best rate."""

    def work_s(self, work: Work) -> float:
        """Seconds of computing ``work``."""
        profile = self.profile
        layer_s = work.scores * profile.s_per_score
        if work.attention_rows:
            layer_s += self._block_s("attention", work.attention_rows, work.attention_share)
        if work.mlp_rows:
            layer_s += self._block_s("mlp", work.mlp_rows, work.mlp_share)
        if work.block_share:
            layer_s += self._sub_blocks_s(work)
        total_s = work.num_layers * layer_s + work.copied * profile.s_per_added_value
        if work.head_rows:  # as long as the MLP's matrices take, value for value
            values = work.head_share * self.spec.vocab_size * self.spec.hidden_size
            total_s += self._block_s("mlp", work.head_rows, 1.0) * values / self.spec.mlp_numel
        if work.embedded_rows:
            total_s += float(evaluate(profile.embedding, work.embedded_rows))
        return total_s * self.factor

    def encode_s(self, traffic: Traffic) -> float:
        """Seconds before a device can send."""
        return traffic.encoded * self.profile.codecs[traffic.codec].encode_s * self.factor if traffic.encoded else 0.0

    def decode_s(self, traffic: Traffic) -> float:
        """Seconds from what came to values that are added up."""
        profile = self.profile
        decoding_s = traffic.decoded * profile.codecs[traffic.codec].decode_s if traffic.decoded else 0.0
        return (decoding_s + traffic.added * profile.s_per_added_value) * self.factor

    def messages_s(self, traffic: Traffic, computed_s: float) -> float:
        """What an exchange takes whatever its bytes, after ``computed_s`` seconds of computing on all devices."""
        link = self.link
        num_messages = max(traffic.num_sent, traffic.num_received)
        waiting_s = float(np.interp(computed_s, link.waiting.computing_s, link.waiting.seconds)) if computed_s else 0.0
        return link.latency_s + num_messages * link.message_s + waiting_s

    def transfer_s(self, traffic: Traffic) -> float:
        """What its bytes add after a pause."""
        num_bytes, transfer = traffic.most_bytes, self.link.transfer
        key = ("transfer", num_bytes, 0.0)
        if key not in self._seconds:
            curve = Curve(num_tokens=(0, *transfer.num_bytes), seconds=(0.0, *transfer.seconds))
            self._seconds[key] = float(evaluate(curve, num_bytes))
        return self._seconds[key]

    def airtime_s(self, traffic: Traffic) -> float:
        """What its bytes, out and in, take of a medium that it shares."""
        return (traffic.sent_bytes + traffic.received_bytes) * self.link.airtime_s_per_byte

    def sending_s(self, traffic: Traffic) -> float:
        """By how much longer computing takes while its bytes go out and come in."""
        return 0.0 if self.link.overlapping is None else traffic.most_bytes * self.link.overlapping.s_per_byte

    @property
    def starting_s(self) -> float:
        """What an exchange takes longer for it."""
        return 0.0 if self.link.overlapping is None else self.link.overlapping.starting_s

    def least_work_s(self, work: Work, *, reads: bool = True) -> float:
        """What arithmetic at the best rate ever seen, and reading the weights once, would take. ``reads``: whether it
        is the first that is computed with them."""
        spec = self.spec
        head = spec.vocab_size * spec.hidden_size * work.head_share
        attention, mlp = spec.attention_numel * work.attention_share, spec.mlp_numel * work.mlp_share
        # Sub-blocks with heads of their own have as many times smaller attention matrices.
        parts = spec.decoupling.num_sub_blocks if spec.decoupling and spec.decoupling.heads == "own" else 1
        block_attention = spec.attention_numel / parts * work.block_heads * work.block_share
        block_mlp = spec.mlp_numel * work.block_columns * work.block_share
        matrices = (
            (work.attention_rows, attention),
            (work.mlp_rows, mlp),
            (work.block_rows, block_attention),
            (work.rows_of_block_mlp, block_mlp),
        )
        weights = 0.0
        if reads:
            weights = head + work.num_layers * sum(numel for rows, numel in matrices if rows)
        products = sum(rows * numel for rows, numel in matrices)
        flops = work.num_layers * (4.0 * work.scores * spec.head_size + 2.0 * products) + 2.0 * work.head_rows * head
        reading_s = weights * WEIGHT_BYTES[self.dtype] / self.profile.memory_bytes_per_s
        return max(flops / self.best_flops, reading_s) * self.profile.alone_factor

    @cached_property
    def best_flops(self) -> float:
        """The most operations a second in any block that was measured."""
        key = ("operation", 0, 0.0)
        if key not in self._seconds:
            rates = []
            for width in self.profile.layers[self.dtype]:
                for curve, numel in ((width.attention, self.spec.attention_numel), (width.mlp, self.spec.mlp_numel)):
                    for rows, seconds in zip(curve.num_tokens, curve.seconds, strict=True):
                        rates.append(2.0 * rows * numel * width.share / seconds)
            self._seconds[key] = max(rates)
        return self._seconds[key]

    def _sub_blocks_s(self, work: Work) -> float:
        """Sub-blocks of one layer, in proportion to the first one. A part of their heads or columns takes as much less
        as it would in a layer that is as wide."""
        total_s = 0.0
        for block, rows, part in (
            ("attention", work.block_rows, work.block_heads),
            ("mlp", work.rows_of_block_mlp, work.block_columns),
        ):
            if part == 0 or rows == 0:
                continue
            seconds = self._sub_block_s(block, rows) * work.block_share
            if part < 1:
                narrow, wide = (self._block_s(block, rows, share * work.block_share) for share in (part, 1.0))
                seconds *= narrow / wide
            total_s += seconds
        return total_s

    def _sub_block_s(self, block: str, rows: int) -> float:
        """Of all sub-blocks' attention or MLP."""
        key = (f"sub-block {block}", rows, 0.0)
        if key not in self._seconds:
            times = self.profile.sub_block.get(self.dtype)
            if times is not None:
                self._seconds[key] = float(evaluate(getattr(times, block), rows)) / times.share
            else:
                self._seconds[key] = self._unmeasured_sub_block_s(block, rows)
        return self._seconds[key]

    def _unmeasured_sub_block_s(self, block: str, rows: int) -> float:
        """The first sub-block, by its part of the hidden units, from layers of a model that is not decoupled. A part as
        large of a layer's heads or columns has as many matrix elements; what it has fewer of is columns between them,
        and more of hidden units, which take what adding values takes."""
        spec = self.spec
        first = spec.sub_block(0)
        width, heads = len(first.units) / spec.hidden_size, len(first.heads) / spec.num_heads
        inner, columns = (heads, spec.attention_columns) if block == "attention" else (1.0, spec.mlp_columns)
        share = width * inner
        touched = INNER_TOUCHED * (inner - share) * columns - HIDDEN_TOUCHED * (1 - width) * spec.hidden_size
        seconds = self._block_s(block, rows, share) + rows * touched / ADDED_TOUCHED * self.profile.s_per_added_value
        return seconds / width

    def _block_s(self, block: str, rows: int, share: float) -> float:
        key = (block, rows, share)
        if key not in self._seconds:
            self._seconds[key] = _at_share(self.profile.layers[self.dtype], block, rows, share)
        return self._seconds[key]


def _at_share(widths: tuple[WidthTimes, ...], block: str, rows: int, share: float) -> float:
    """Between two measured widths, and below the least, on a straight line; never below what is in proportion."""
    points = [(width.share, float(evaluate(getattr(width, block), rows))) for width in widths]
    points.sort()
    if len(points) == 1:
        return points[0][1] * share / points[0][0]
    upper = next((number for number, point in enumerate(points) if point[0] >= share), len(points) - 1)
    (low, low_s), (high, high_s) = points[max(0, upper - 1)], points[max(1, upper)]
    line_s = low_s + (high_s - low_s) * (share - low) / (high - low)
    return max(line_s, points[0][1] * min(1.0, share / points[0][0]))


def weight_bytes(
    spec: TransformerSpec, share: LayerShare, dtype: str, num_layers: int, sub_block: SubBlock | None = None
) -> int:
    """Of the layers' matrices, or those of a sub-block of them, as a device keeps them (``LocalModel.num_bytes``)."""
    heads, kv_heads, columns = len(share.heads), len(share.kv_heads(spec)), len(share.columns)
    width = spec.hidden_size if sub_block is None else len(sub_block.units)
    outer = (heads + 2 * kv_heads) * spec.head_size
    inner = columns * (2 if spec.has_gate else 1)
    values = width * (outer + heads * spec.head_size + inner + columns)
    scales = outer + inner + width * ((heads > 0) + (columns > 0)) if dtype == "int8" else 0
    return num_layers * (values * WEIGHT_BYTES[dtype] + 4 * scales)


def working_bytes(
    spec: TransformerSpec,
    share: LayerShare,
    request: InferenceRequest,
    num_devices: int,
    *,
    num_sub_blocks: int = 0,
    is_frugal: bool = False,
) -> int:
    """What computing takes at once beside the weights, or loading them, if that is more: an estimate from above.
    ``num_sub_blocks``: that it has of a decoupled layer, whose queries, keys and values are there together.
    ``is_frugal``: what is not used any more is not there any more (``Question.is_frugal``)."""
    rows = request.batch * request.num_tokens
    gates = 2 if spec.has_gate else 1
    inner, heads = gates * len(share.columns), 3 * len(share.heads) * spec.head_size
    exchanged = 3 * spec.hidden_size * num_devices
    if is_frugal:
        values = 5 * spec.hidden_size + max(2 * inner, max(1, num_sub_blocks) * heads, exchanged)
    else:
        values = 8 * spec.hidden_size + 2 * (inner + heads) + exchanged
    largest = spec.hidden_size * max(inner, heads)
    # Reading takes a matrix twice beside itself, or what was freed before once more.
    return 4 * max(rows * values + request.batch * request.num_tokens**2, (2 if is_frugal else 3) * largest)


def generation_bytes(spec: TransformerSpec, share: LayerShare, request: InferenceRequest, dtype: str) -> int:
    """What continuing takes beside all that: keys and values (``KVCache``), and the head; 0 for other requests."""
    if not request.num_new_tokens:
        return 0
    slots = _num_slots(spec, request)
    cached = 8 * spec.num_layers * request.batch * slots * _num_cached(spec, share) * spec.head_size
    return cached + len(share.vocabulary) * spec.hidden_size * WEIGHT_BYTES[dtype]


def block_generation_bytes(
    spec: TransformerSpec,
    blocks: Sequence[LayerShare],
    shares: Mapping[int, LayerShare | None],
    vocabulary: int,
    request: InferenceRequest,
    dtype: str,
) -> int:
    """As ``generation_bytes``, of a decoupled model: every sub-block, of which a device has ``blocks``, has a cache of
    its own heads."""
    if not request.num_new_tokens:
        return 0
    assert spec.decoupling is not None
    originals = spec.decoupling.original_layers
    held = [shares.get(number, LayerShare.whole(spec)) for number in originals]
    heads = sum(_num_cached(spec, share) for share in held if share is not None)
    heads += (spec.num_layers - len(originals)) * sum(_num_cached(spec, block) for block in blocks)
    return 8 * request.batch * _num_slots(spec, request) * heads * spec.head_size + (
        vocabulary * spec.hidden_size * WEIGHT_BYTES[dtype]
    )


def _num_cached(spec: TransformerSpec, share: LayerShare) -> int:
    """Key/value heads that a cache keeps of one layer (``Layer.num_cached_heads``)."""
    heads = share.heads
    is_grouped = len(share.kv_heads(spec)) == 1 or not (len(heads) % spec.heads_per_kv_head)
    return len(share.kv_heads(spec)) if is_grouped else len(heads)


def _num_slots(spec: TransformerSpec, request: InferenceRequest) -> int:
    seen = request.num_tokens + request.num_new_tokens
    return min(seen, spec.sliding_window or seen)
