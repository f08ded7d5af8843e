"""DeTransformer's latency table (Wei et al., DATE 2024: four Raspberry Pi 4B, 128 tokens, FP32) simulated, ours beside.

What is simulated is the published algorithms on the published devices: tensor parallelism by ring all-reduces,
sequence parallelism with one all-gather of keys and values a layer, and the timed block-parallel model (four groups of
three layers, four sub-blocks, whose queries, keys and values are h/4 → h/4: ``heads`` ``own``; the model that was
scored has h/4 → h) with all original layers under BP+TP, BP+SP or BP+Allgather. Ours is the planner's choice for the
model **as scored**, with our exchanges, on the same links.

Two quantities are not published, and are chosen such that ``rms_deviation`` is least over the 16 figures, on a grid of
0.25 ms and 0.05: what a message of gloo takes, and the share of a link's set rate that arrives. All else is as in
``devices``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.inference import choose, predict
from isthmus.simulation.devices import kind
from isthmus.simulation.inference import at_bandwidth, question_of
from isthmus.simulation.profiles import SOCKETS, Transport
from isthmus.simulation.shapes import SHAPES, decoupled
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.simulated import OwnFigure, PublishedFigure, PublishedReport, SimulatedDevice
from isthmus.spec.transformer import TransformerSpec

NUM_DEVICES = 4
REQUEST = InferenceRequest(num_tokens=128)
GLOO = Transport(exchange_s=0.0, message_s=7.5e-4, link_share=0.7)
"""0.75 ms a message: an all-reduce of four devices sends six, one after the other."""
_OURS = replace(SOCKETS, link_share=GLOO.link_share)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Latencies by that of one device, read off the published plot (± 0.03)."""

    model: str
    mbit_per_s: float
    tensor: float
    sequence: float
    block_tensor: float
    block_best: float


TABLE = (
    _Row(model="bert-base", mbit_per_s=1000, tensor=0.43, sequence=0.39, block_tensor=0.34, block_best=0.34),
    _Row(model="bert-base", mbit_per_s=250, tensor=0.91, sequence=0.78, block_tensor=0.56, block_best=0.47),
    _Row(model="bert-base", mbit_per_s=125, tensor=1.56, sequence=1.29, block_tensor=0.86, block_best=0.55),
    _Row(model="bert-large", mbit_per_s=125, tensor=0.86, sequence=0.71, block_tensor=0.52, block_best=0.42),
)
STRATEGIES = {"tensor": "TP", "sequence": "SP", "block_tensor": "BP+TP", "block_best": "best BP"}


def reproduce() -> PublishedReport:
    """The published table beside the simulated one, and our plans for the same devices and links."""
    ours = []
    for row in TABLE:
        devices = _devices(row)
        alone = question_of(SHAPES[row.model], REQUEST, devices, transport=GLOO)
        ours += _ours(row.model, devices, predict(alone, InferencePlan.even("single", 1)).latency_s)
    return PublishedReport(device=kind("raspberry-pi-4b"), figures=published_figures(), ours=tuple(ours))


def published_figures(transport: Transport = GLOO) -> tuple[PublishedFigure, ...]:
    """Every figure of the table, and the same simulated with ``transport``."""
    figures = []
    for row in TABLE:
        alone_s, seconds = _theirs(SHAPES[row.model], _devices(row), transport)
        figures += [
            PublishedFigure(
                model=row.model,
                bits_per_s=row.mbit_per_s * 1e6,
                strategy=strategy,
                published=getattr(row, name),
                simulated=seconds[name] / alone_s,
            )
            for name, strategy in STRATEGIES.items()
        ]
    return tuple(figures)


def rms_deviation(figures: Sequence[PublishedFigure]) -> float:
    """Root mean square of the logarithms of simulated ÷ published."""
    return math.sqrt(sum(math.log(each.simulated / each.published) ** 2 for each in figures) / len(figures))


def _devices(row: _Row) -> tuple[SimulatedDevice, ...]:
    return at_bandwidth((kind("raspberry-pi-4b"),) * NUM_DEVICES, row.mbit_per_s * 1e6)


def _theirs(
    spec: TransformerSpec, devices: tuple[SimulatedDevice, ...], transport: Transport
) -> tuple[float, dict[str, float]]:
    """Seconds on one device, and of each published strategy."""
    form = decoupled(spec, 4, spec.num_layers // 3, heads="own")

    def seconds_of(plan: InferencePlan, of: TransformerSpec = spec) -> float:
        return predict(question_of(of, REQUEST, devices, transport=transport), plan).latency_s

    even = InferencePlan.even("block", NUM_DEVICES)
    assert form.decoupling is not None
    block = {
        way: seconds_of(replace(even, originals=(way,) * len(form.decoupling.original_layers)), form)
        for way in ("tensor", "sequence", "gather")
    }
    found = {
        "tensor": seconds_of(replace(InferencePlan.even("tensor", NUM_DEVICES), algorithm="ring")),
        "sequence": seconds_of(InferencePlan.even("sequence", NUM_DEVICES)),
        "block_tensor": block["tensor"],
        "block_best": min(block.values()),
    }
    return seconds_of(InferencePlan.even("single", 1)), found


def _ours(model: str, devices: tuple[SimulatedDevice, ...], one_device_s: float) -> Iterator[OwnFigure]:
    spec = SHAPES[model]
    scored = decoupled(spec, 4, spec.num_layers // 3)
    for codec in ("fp32", "int8"):
        chosen = choose(question_of(scored, REQUEST, devices, codecs=(codec,), transport=_OURS)).chosen
        yield OwnFigure(
            model=model,
            bits_per_s=devices[0].bits_per_s,
            codec=codec,
            plan=f"{chosen.plan.strategy} {chosen.plan.way}".strip(),
            latency_s=chosen.latency_s,
            one_device_s=one_device_s,
        )
