"""From a plan to what is drawn of it: the planner's own steps, seconds, bytes and pieces, on simulated devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from svg import Band, Block, Lane, Panel

from isthmus.planning.block_layout import BlockLayout
from isthmus.planning.block_steps import block_steps
from isthmus.planning.device_costs import DeviceCosts
from isthmus.planning.inference import costs_of
from isthmus.planning.pieces import held_bytes, pieces_of
from isthmus.planning.step_seconds import Crew
from isthmus.planning.steps import Step, Work
from isthmus.planning.workload import passes, workload
from isthmus.simulation.inference import question_of
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.simulated import SimulatedDevice
from isthmus.spec.transformer import TransformerSpec

NUM_LAYERS = 3
"""That are drawn. A decoupled model has one more: what is drawn ends with the exchange that it brings about."""


@dataclass(frozen=True)
class Sent:
    """What an exchange is called. ``num_steps`` of the planner's are one of it; ``in_layer``: it comes between a
    layer's queries, keys and values and the rest, which the planner takes together."""

    name: str
    num_steps: int = 1
    in_layer: bool = False
    pattern: str = "all"
    device: int = 0
    teams: tuple[tuple[int, int], ...] = ()


def panel_of(
    plan: InferencePlan,
    spec: TransformerSpec,
    devices: Sequence[SimulatedDevice],
    sent: Sequence[Sent],
    *,
    parts: Sequence[str],
    request: InferenceRequest,
    title: str = "",
) -> Panel:
    """The first layers of ``spec`` under ``plan``, with all exchanges, which are called ``sent``."""
    costs = costs_on(spec, request, devices)
    steps, track = layer_steps(plan, spec, request), _Track(len(devices))
    names, layer, number = list(sent), 0, 0
    while number < len(steps):
        step = steps[number]
        layer += any(work.attention_rows or (work.block_rows and work.block_heads) for work in step.work)
        parts_of = [list(_computing(cost, work, layer, request)) for cost, work in zip(costs, step.work, strict=True)]
        if step.exchange is None:
            track.compute(parts_of)
            number += 1
            continue
        name = names.pop(0)
        track.compute([each[:1] for each in parts_of] if name.in_layer else parts_of)
        track.exchange(name, steps[number : number + name.num_steps], costs)
        if name.in_layer:
            track.compute([each[1:] for each in parts_of])
        number += name.num_steps
    assert not names, names
    return Panel(
        lanes=lanes_of(plan, spec, parts, NUM_LAYERS),
        blocks=tuple(track.blocks),
        bands=tuple(track.bands),
        end_s=max(track.now_s),
        title=title,
    )


def layer_steps(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> list[Step]:
    """Of the layers that are drawn; where tokens are generated, of one token more."""
    if request.num_new_tokens:
        load = passes(plan, spec, request)[1][0]
        return list(load.before[1:-1] if plan.strategy == "block" else load.layer * NUM_LAYERS)
    if plan.strategy == "block":
        last = 4 if BlockLayout.of(plan, spec).has_teams else 1  # the layer more, and what ends it
        return list(block_steps(plan, spec, request)[0][:-last])
    return list(workload(plan, spec, request).layer * NUM_LAYERS)


def costs_on(spec: TransformerSpec, request: InferenceRequest, devices: Sequence[SimulatedDevice]) -> list[DeviceCosts]:
    return list(costs_of(question_of(spec, request, devices), "fp32").values())


def lanes_of(plan: InferencePlan, spec: TransformerSpec, parts: Sequence[str], num_layers: int) -> tuple[Lane, ...]:
    """``parts``: what each device works on, in words."""
    [whole] = pieces_of(InferencePlan.even("single", 1), replace(spec, decoupling=None))
    layer_bytes = held_bytes(spec, whole) / spec.num_layers
    lanes = []
    for number, (part, pieces) in enumerate(zip(parts, pieces_of(plan, spec), strict=True)):
        held = [held_bytes(spec, [each for each in pieces if each.layer == layer]) for layer in range(num_layers)]
        shares = tuple(num_bytes / layer_bytes for num_bytes in held)
        lanes.append(Lane(name=f"device {number + 1}", part=part, held=shares, held_bytes=sum(held)))
    return tuple(lanes)


@dataclass(frozen=True)
class _Part:
    """Of what a device computes in a step."""

    seconds: float
    kind: str
    labels: tuple[str, ...]


class _Track:
    """What devices have done so far. They wait for one another in exchanges only."""

    def __init__(self, num_devices: int) -> None:
        self.now_s = [0.0] * num_devices
        self.blocks: list[Block] = []
        self.bands: list[Band] = []

    def compute(self, parts_of: Sequence[Sequence[_Part]]) -> None:
        for device, parts in enumerate(parts_of):
            for part in parts:
                start_s, kind = self.now_s[device], part.kind
                self.blocks.append(
                    Block(device=device, start_s=start_s, seconds=part.seconds, kind=kind, labels=part.labels)
                )
                self.now_s[device] += part.seconds

    def exchange(self, sent: Sent, steps: Sequence[Step], costs: Sequence[DeviceCosts]) -> None:
        start_s, seconds = max(self.now_s), sum(_exchange_s(step, costs) for step in steps)
        self.bands.append(
            Band(
                name=sent.name,
                num_bytes=sum(max(traffic.most_bytes for traffic in step.exchange or ()) for step in steps),
                start_s=start_s,
                seconds=seconds,
                pattern=sent.pattern,
                device=sent.device,
                teams=sent.teams,
            )
        )
        self.now_s = [start_s + seconds] * len(self.now_s)


def _exchange_s(step: Step, costs: Sequence[DeviceCosts]) -> float:
    """Of a step, beyond computing."""
    computing_s = max(cost.work_s(work) for cost, work in zip(costs, step.work, strict=True))
    return Crew(costs).step_s(step, [0.0] * len(costs)) - computing_s


def _computing(cost: DeviceCosts, work: Work, layer: int, request: InferenceRequest) -> Iterator[_Part]:
    """What a device computes in a step, in order; a layer of its tokens begins with queries, keys and values."""
    total_s = cost.work_s(work)
    if not total_s:
        return
    rows = request.batch * (1 if request.num_new_tokens else request.num_tokens)
    if work.block_rows and work.block_heads and work.block_columns:
        yield _Part(total_s, "slice", (f"layer {layer}", str(layer)))
    elif work.block_rows:
        name = "attention" if work.block_heads else "MLP"
        yield _Part(total_s, "slice", (f"layer {layer}: {name}", name, name[0].upper()))
    elif not (work.attention_rows and work.mlp_rows):
        kind = "heads" if max(work.attention_share, work.mlp_share) < 1 else "whole"
        name = "attention" if work.attention_rows else "MLP"
        yield _Part(total_s, kind, (f"layer {layer}: {name}", name, name[0].upper()))
    elif work.mlp_rows == rows:
        yield _Part(total_s, "whole", (f"layer {layer}",))
    else:
        spec = cost.spec
        share = (spec.num_heads / 2 + spec.num_kv_heads) / (spec.num_heads + spec.num_kv_heads)
        is_of_all = work.attention_rows > work.mlp_rows
        first_rows = rows if is_of_all else work.mlp_rows
        first_s = share * cost.work_s(Work(attention_rows=first_rows, attention_share=1.0))
        yield _Part(first_s, "whole" if is_of_all else "tokens", ("qkv",))
        yield _Part(total_s - first_s, "tokens", (f"layer {layer}", str(layer)))
