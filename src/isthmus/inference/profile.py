"""Measures this device with the layers of the model that it is to compute, and with all others of a group the links.

Each part is measured as a strategy runs it (``Strategy._block``), on several layers in turn, since one layer's weights
alone would stay in the cache, and on all devices at the same time.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import count, cycle

import torch
from torch import Tensor

from isthmus.inference.kernels import MOST_ROWS
from isthmus.inference.kv_cache import KVCache
from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.native_blocks import NativeBlocks
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import BlockPart
from isthmus.planning.curves import monotone
from isthmus.planning.device_costs import WEIGHT_BYTES
from isthmus.profiling.cache import find, keep
from isthmus.profiling.limits import cpu_quota, free_memory_bytes
from isthmus.profiling.network import is_as_measured, measure_link, share_texts, start
from isthmus.profiling.steady import steady_s
from isthmus.reporting.environment import cpu_name
from isthmus.spec.cluster import ClusterProfile, CodecTimes, DeviceProfile, LinkProfile, Transfer, Waiting, WidthTimes
from isthmus.spec.errors import IsthmusError
from isthmus.spec.profile import Curve
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.transformer import LayerShare, Range, TransformerSpec
from isthmus.transport.base import Group
from isthmus.transport.codec import CODEC_NAMES, create_codec

_WIDTHS = (1, 2, 4)
_CACHE_BYTES = 96 << 20
"""More than a processor's caches hold for one of its cores."""
_MOST_ROWS = 512
_CODEC_VALUES = 1 << 16
_STREAM_VALUES = 16 << 20
_ALONE_S = 0.1
_NONE = BlockPart.alone(Range(start=0, stop=0))


def measure_cluster(
    reader: ShardReader,
    group: Group | None,
    *,
    dtypes: Sequence[str] = ("fp32",),
    num_rows: int = 128,
    refresh: bool = False,
    is_link_kept: bool = False,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> ClusterProfile:
    """What all devices of ``group`` need, the same on each. Called by all; blocks for some seconds.

    ``num_rows``: the most tokens a request will have. What was measured of the devices before, in a group of the same
    kind, is taken from the cache unless ``refresh``; links are measured anew each time, or with ``is_link_kept`` where
    one exchange shows that they have changed. ``names``: the devices', in the order of ranks; their hosts' without.
    Must be called with PyTorch's number of threads set as it will be when computing.
    """
    rows = _grid(num_rows)
    own = _identity(reader, dtypes, rows)
    everybody = share_texts(group, json.dumps(own)) if group is not None else [json.dumps(own)]
    identity = own | {"group": sorted(everybody), "size": len(everybody)}
    known = None if refresh else find(DeviceProfile, identity)
    if group is not None:
        known = known if all(text == "1" for text in share_texts(group, "1" if known else "0")) else None
    if known is None:
        progress("measuring the devices")
        known = _measure_device(reader, group, dtypes, rows)
        keep(identity, known)
    rank = group.rank if group is not None else 0
    name = names[rank] if names is not None else f"{platform.node() or 'device'}-{rank}"
    known = replace(known, name=name, free_memory_bytes=free_memory_bytes())
    if group is None or group.world_size == 1:
        return _profile(reader, [known], [_no_link(known)], "none")
    link_identity = {"what": "link", "rank": rank, "device": identity}
    link = _kept_link(group, link_identity) if is_link_kept and not refresh else None
    if link is None:
        progress("measuring the links")
        link = _measure_link(reader, group, dtypes[0], rows)
        keep(link_identity, link)
    texts = share_texts(group, json.dumps([to_json(known), to_json(link)]))
    pairs = [json.loads(text) for text in texts]
    return _profile(
        reader,
        [from_json(DeviceProfile, device) for device, _ in pairs],
        [from_json(LinkProfile, link) for _, link in pairs],
        type(group).__name__.removesuffix("Group").lower(),
    )


def _kept_link(group: Group, identity: dict[str, object]) -> LinkProfile | None:
    """What was measured before, if all have it and it is still so."""
    link = find(LinkProfile, identity)
    if any(text == "0" for text in share_texts(group, "0" if link is None else "1")) or link is None:
        return None
    return link if is_as_measured(group, link) else None


def _profile(
    reader: ShardReader, devices: Sequence[DeviceProfile], links: Sequence[LinkProfile], transport: str
) -> ClusterProfile:
    return ClusterProfile(
        transport=transport,
        model=reader.spec.model_type,
        devices=tuple(devices),
        links=tuple(links),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _no_link(device: DeviceProfile) -> LinkProfile:
    """Of a device that is alone: nothing is ever sent."""
    return LinkProfile(
        round_trip_s=0.0,
        latency_s=0.0,
        message_s=0.0,
        waiting=Waiting(computing_s=(1.0,), seconds=(0.0,)),
        sum_step_s=0.0,
        transfer=Transfer(num_bytes=(1,), seconds=(1 / device.memory_bytes_per_s,)),
        bytes_per_s=device.memory_bytes_per_s,
    )


def _identity(reader: ShardReader, dtypes: Sequence[str], rows: Sequence[int]) -> dict[str, object]:
    """What a device's seconds depend on."""
    return {
        "what": "device",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "quota": cpu_quota(),
        "model": to_json(reader.spec),
        "dtypes": list(dtypes),
        "rows": list(rows),
        "versions": [version("torch"), version("isthmus")],
    }


def _grid(num_rows: int) -> list[int]:
    most = min(num_rows, _MOST_ROWS)
    return sorted({rows for rows in (1, 8, 32, 64, 128, 256) if rows < most} | {most})


# --- one device -------------------------------------------------------------------------------------------------------


class _Parts:
    """Runs the two blocks of a layer as any strategy does, with as many keys as rows and nothing to sum up. So few rows
    as a decoder continues at once are one token of each of so many sequences."""

    def __init__(self, model: LocalModel, layers: Sequence[Layer] | None = None) -> None:
        """``layers``: those that are run, the model's own by default."""
        self.model = model
        self._layers = model.layers if layers is None else layers
        self._width = self._layers[0].width
        self._block = TensorParallel(model, None)._block
        self._turns = count()

    def attention(self, rows: int) -> Callable[[], object]:
        if (blocks := self._token_blocks(rows)) is not None:
            return _in_turn(blocks, 0)
        hidden = torch.randn(1, rows, self._width)
        rotation = self.model.rotation(torch.arange(rows)[None])

        def run() -> Tensor:
            layer = self._next()
            return self._block(
                hidden, layer.norm1, lambda x: layer.attend(*layer.project(x, rotation), None, False), layer.o_bias
            )

        return run

    def mlp(self, rows: int) -> Callable[[], object]:
        if (blocks := self._token_blocks(rows)) is not None:
            return _in_turn(blocks, 1)
        hidden = torch.randn(1, rows, self._width)

        def run() -> Tensor:
            layer = self._next()
            return self._block(hidden, layer.norm2, layer.mlp, layer.down_bias)

        return run

    def _token_blocks(self, rows: int) -> NativeBlocks | None:
        model, layers = self.model, list(self._layers)
        if model.kernels is None or rows > MOST_ROWS:
            return None
        cache = KVCache(
            num_layers=len(layers),
            num_heads=layers[0].num_cached_heads,
            head_size=model.spec.head_size,
            capacity=2,
            attended_BT=torch.ones(rows, 1),
        )
        hidden_BH, positions_B1 = torch.randn(rows, self._width), torch.ones(rows, 1, dtype=torch.int64)
        native = NativeBlocks(
            layers,
            cache,
            model.kernels,
            hidden_BH,
            torch.empty_like(hidden_BH),
            adds=False,
            positions_B1=positions_B1,
            rotary=model.rotary_table(2),
        )
        native.next_token()
        return native

    def _next(self) -> Layer:
        return self._layers[next(self._turns) % len(self._layers)]


def _in_turn(native: NativeBlocks, first: int) -> Callable[[], object]:
    """Every other block."""
    turns = cycle(native.blocks[first::2])

    def run() -> NativeBlocks:
        next(turns)()
        return native  # which keeps what the blocks point to

    return run


def _read_parts(reader: ShardReader, width: int, dtype: str) -> tuple[float, _Parts]:
    """Some layers of which this device has one part in ``width``, and that part."""
    share, part = _narrow(reader.spec, width)
    per_layer = (reader.spec.attention_numel + reader.spec.mlp_numel) * part * WEIGHT_BYTES[dtype]
    room = min(_CACHE_BYTES, free_memory_bytes() // 4)
    num_layers = max(1, min(reader.spec.num_layers, math.ceil(room / per_layer)))
    if (form := reader.spec.decoupling) is None:
        return part, _Parts(LocalModel(reader, share, dtype, layer_range=Range(start=0, stop=num_layers)))
    if not form.original_layers:
        raise IsthmusError("model: all of its layers are decoupled; wanted at least one in which slices meet")
    others = dict.fromkeys(form.original_layers[num_layers:])
    return part, _Parts(LocalModel(reader, share, dtype, block_part=_NONE, original_shares=others))


def _read_sub_block(reader: ShardReader, dtype: str) -> tuple[float, _Parts]:
    """The first sub-block of every decoupled layer, and the part of the hidden units that it has."""
    form = reader.spec.decoupling
    assert form is not None
    first = BlockPart.alone(Range(start=0, stop=1))
    model = LocalModel(
        reader,
        LayerShare.whole(reader.spec),
        dtype,
        block_part=first,
        original_shares=dict.fromkeys(form.original_layers),
    )
    return form.widths[0] / reader.spec.hidden_size, _Parts(model, [blocks[0] for blocks in model.blocks.values()])


def _narrow(spec: TransformerSpec, width: int) -> tuple[LayerShare, float]:
    heads = Range(start=0, stop=max(1, spec.num_heads // width))
    num_kv_heads = -(-len(heads) // spec.heads_per_kv_head)
    part = (len(heads) + num_kv_heads) / (spec.num_heads + spec.num_kv_heads)
    columns = Range(start=0, stop=max(1, round(spec.intermediate_size * part)))
    return LayerShare(heads=heads, columns=columns, vocabulary=Range(start=0, stop=0)), part


@torch.inference_mode()
def _measure_device(
    reader: ShardReader, group: Group | None, dtypes: Sequence[str], rows: Sequence[int]
) -> DeviceProfile:
    layers: dict[str, tuple[WidthTimes, ...]] = {}
    sub_blocks: dict[str, WidthTimes] = {}
    s_per_score = _s_per_score(reader.spec, rows[-1])
    for dtype in dtypes:
        widths: dict[float, WidthTimes] = {}
        for width in _WIDTHS:
            share, parts = _read_parts(reader, width, dtype)
            if group is not None:
                start(group)
            attention = _without_scores(_curve(parts.attention, rows), s_per_score * len(parts.model.share.heads))
            widths[share] = WidthTimes(share=share, attention=attention, mlp=_curve(parts.mlp, rows))
        layers[dtype] = tuple(widths.values())
        if reader.spec.decoupling is not None:
            share, parts = _read_sub_block(reader, dtype)
            if group is not None:
                start(group)
            num_heads = len(parts.model.sub_blocks[0].heads)
            attention = _without_scores(_curve(parts.attention, rows), s_per_score * num_heads)
            sub_blocks[dtype] = WidthTimes(share=share, attention=attention, mlp=_curve(parts.mlp, rows))
    _, parts = _read_parts(reader, 1, dtypes[0])
    # Both at the same moment, so that other work on the machine meets both alike.
    together_s = _together_s(parts, rows[-1], group)
    alone_s = _alone_s(parts, rows[-1], group)
    values, other = torch.randn(_CODEC_VALUES), torch.randn(_CODEC_VALUES)
    return DeviceProfile(
        name="",
        cpu_name=cpu_name(),
        num_threads=torch.get_num_threads(),
        free_memory_bytes=free_memory_bytes(),
        memory_bytes_per_s=_memory_bytes_per_s(),
        layers=layers,
        sub_block=sub_blocks,
        embedding=_curve(lambda num: _embed(parts.model, num), rows),
        s_per_score=s_per_score,
        codecs={name: _codec_times(name, values) for name in CODEC_NAMES},
        s_per_added_value=steady_s(lambda: other.add_(values)) / _CODEC_VALUES,
        alone_factor=min(1.0, alone_s / together_s),
    )


def _curve(task: Callable[[int], Callable[[], object]], rows: Sequence[int]) -> Curve:
    return monotone(Curve(num_tokens=tuple(rows), seconds=tuple(steady_s(task(num)) for num in rows)))


def _without_scores(curve: Curve, s_per_pair: float) -> Curve:
    """Less the seconds of as many keys as rows; at least half of each point, as what is subtracted is measured too."""
    seconds = [
        max(second / 2, second - rows * rows * s_per_pair)
        for rows, second in zip(curve.num_tokens, curve.seconds, strict=True)
    ]
    return monotone(Curve(num_tokens=curve.num_tokens, seconds=tuple(seconds)))


def _embed(model: LocalModel, rows: int) -> Callable[[], Tensor]:
    ids = torch.randint(model.spec.vocab_size, (1, rows))
    positions = torch.arange(rows)[None] % model.spec.max_num_tokens
    return lambda: model.embed(ids, positions)


def _s_per_score(spec: TransformerSpec, rows: int) -> float:
    """Of one query, key and head more: seconds by the number of keys."""
    rows = max(rows, 32)
    query = torch.randn(1, spec.num_heads, rows, spec.head_size)
    key = torch.randn(1, spec.num_heads, 2 * rows, spec.head_size)

    def attend(keys: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, keys)

    seconds = steady_s(attend(key)) - steady_s(attend(key[:, :, :rows].contiguous()))
    return max(0.0, seconds) / (rows * rows * spec.num_heads)


def _codec_times(name: str, values: Tensor) -> CodecTimes:
    if name == "fp32":
        return CodecTimes(encode_s=0.0, decode_s=0.0)
    codec = create_codec(name)
    encoded = torch.empty(codec.num_bytes(_CODEC_VALUES), dtype=torch.uint8)
    decoded = torch.empty(_CODEC_VALUES)
    return CodecTimes(
        encode_s=steady_s(lambda: codec.encode(values, encoded)) / _CODEC_VALUES,
        decode_s=steady_s(lambda: codec.decode(encoded, decoded)) / _CODEC_VALUES,
    )


def _memory_bytes_per_s() -> float:
    values = torch.zeros(_STREAM_VALUES)
    return values.nbytes / steady_s(values.sum)


def _together_s(parts: _Parts, rows: int, group: Group | None) -> float:
    if group is not None:
        start(group)
    return steady_s(parts.attention(rows), window_s=_ALONE_S) + steady_s(parts.mlp(rows), window_s=_ALONE_S)


def _alone_s(parts: _Parts, rows: int, group: Group | None) -> float:
    """As above on the leader, while the others wait for it; the leader's on all."""
    seconds = torch.zeros(1, dtype=torch.int64)
    if group is None:
        return _together_s(parts, rows, None)
    if group.rank == 0:
        seconds[0] = round(1e9 * _together_s(parts, rows, None))
    group.broadcast(seconds)
    return float(seconds) / 1e9


@torch.inference_mode()
def _measure_link(reader: ShardReader, group: Group, dtype: str, rows: Sequence[int]) -> LinkProfile:
    _, parts = _read_parts(reader, _WIDTHS[-1], dtype)
    num_summed = reader.spec.hidden_size if reader.spec.is_decoder else 0
    computes = parts.mlp(1), parts.mlp(rows[-1])
    may_overlap = reader.spec.decoupling is not None
    return measure_link(group, computes, num_summed=num_summed, may_overlap=may_overlap)
