"""Draws the pictures of docs/plans.md: each plan's steps as the planner sees them, to scale.

    python docs/pictures/draw_plans.py

A change of what the planner says changes the pictures; a test compares them with those that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from panels import NUM_LAYERS, Sent, costs_on, lanes_of, panel_of
from svg import Band, Block, Panel, Picture, draw, seconds_text

from isthmus.planning.block_layout import block_parts
from isthmus.planning.shares import divide, divide_layer
from isthmus.planning.step_seconds import Crew
from isthmus.planning.workload import layer_ranges, workload
from isthmus.simulation.devices import kind
from isthmus.simulation.shapes import SHAPES
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.simulated import SimulatedDevice
from isthmus.spec.transformer import Range, TransformerSpec

FOLDER = Path(__file__).parent
NUM_DEVICES = 4
REQUEST = InferenceRequest(num_tokens=128)
TOKEN = InferenceRequest(num_tokens=64, num_new_tokens=32)
TEXTS = InferenceRequest(num_tokens=128, batch=8)
PLAIN = replace(SHAPES["bert-base"], num_layers=NUM_LAYERS)
TWO = replace(PLAIN, num_layers=NUM_LAYERS + 1).decoupled(2, (NUM_LAYERS - 1,))
DECOUPLED = replace(PLAIN, num_layers=NUM_LAYERS + 1).decoupled(NUM_DEVICES, (NUM_LAYERS - 1,))
PI = replace(kind("raspberry-pi-4b"), bits_per_s=125e6)
FAST = replace(kind("raspberry-pi-5"), bits_per_s=125e6)
PIS = (PI,) * NUM_DEVICES
ONE, TENSOR, SEQUENCE, PIPELINE, BLOCK = (
    InferencePlan.even(strategy, 1 if strategy == "single" else NUM_DEVICES)
    for strategy in ("single", "tensor", "sequence", "pipeline", "block")
)

GATHER, EXCHANGE, SUM = Sent("all-gather"), Sent("all-to-all"), Sent("all-reduce", num_steps=2)
TEAMS = ((0, 1), (2, 3))
TEAM_SUM, TEAM_PARTS = Sent("all-reduce", num_steps=2, teams=TEAMS), Sent("reduce-scatter", teams=TEAMS)
KEYS = Sent("keys, values", in_layer=True)


def pictures() -> dict[str, str]:
    """SVG by file name."""
    return {f"{name}.svg": draw(picture) for name, picture in described().items()}


def described() -> dict[str, Picture]:
    """What is drawn, by name."""
    one_axis = dict(_of_plain_models()) | dict(_of_decoupled_models())
    return {"pipeline": _pipeline(), "generation": _generation()} | one_axis


def _picture(title: str, subtitle: str, panel: Panel, note: str = "") -> Picture:
    """On the axis that those of a single text share."""
    alone_s = _alone_s(PI) if len(panel.lanes) > 1 else None
    return Picture(
        title=title, subtitle=subtitle, panels=(panel,), span_s=0.345, tick_s=0.05, alone_s=alone_s, note=note
    )


def _alone(device: SimulatedDevice) -> Panel:
    return panel_of(ONE, PLAIN, (device,), (), parts=("everything",), request=REQUEST)


def _alone_s(device: SimulatedDevice) -> float:
    return _alone(device).end_s


def _of_plain_models() -> Iterator[tuple[str, Picture]]:
    yield "one-device", _picture("One device", "It holds and computes everything, and sends nothing.", _alone(PI))
    yield (
        "tensor-parallel",
        _picture(
            "Tensor parallel",
            "Every device computes some attention heads (A) and MLP columns of all tokens. Each is a part of a sum:\n"
            "two all-reduces a layer.",
            panel_of(TENSOR, PLAIN, PIS, (SUM, SUM) * NUM_LAYERS, parts=_heads(PLAIN), request=REQUEST),
        ),
    )
    yield (
        "sequence-parallel",
        _picture(
            "Sequence parallel",
            "Every device computes whole layers of its tokens. Attention needs the keys and values of all tokens:\n"
            "one all-gather a layer, after its tokens' queries, keys and values (narrow).",
            panel_of(SEQUENCE, PLAIN, PIS, (KEYS,) * NUM_LAYERS, parts=_tokens(SEQUENCE), request=REQUEST),
        ),
    )


def _of_decoupled_models() -> Iterator[tuple[str, Picture]]:
    slices = [f"slice {number + 1}" for number in range(NUM_DEVICES)]
    with_heads = [f"{own}, {part}" for own, part in zip(slices, _heads(PLAIN), strict=True)]
    with_tokens = [f"{own}, {part}" for own, part in zip(slices, _tokens(BLOCK), strict=True)]
    for way, name, what, sent, parts in (
        (
            "gather",
            "gather (BP+Allgather)",
            "Slices come together on every device, and every device computes all of it.",
            (GATHER,),
            slices,
        ),
        (
            "tokens",
            "tokens",
            "Slices come together. Every device computes queries, keys and values (qkv) of all tokens,\n"
            "and everything else of its own tokens.",
            (GATHER, EXCHANGE),
            with_tokens,
        ),
        (
            "sequence",
            "sequence (BP+SP)",
            "Slices become tokens, keys and values are gathered as in sequence parallelism, tokens become slices.",
            (EXCHANGE, KEYS, EXCHANGE),
            with_tokens,
        ),
        (
            "tensor",
            "tensor (BP+TP)",
            "Slices come together, every device computes some heads (A) and MLP columns, and two all-reduces add up.",
            (GATHER, SUM, SUM),
            with_heads,
        ),
    ):
        panel = panel_of(replace(BLOCK, originals=(way,)), DECOUPLED, PIS, sent, parts=parts, request=REQUEST)
        yield f"block-{way}", _picture(f"Block parallel, original layer 3: {name}", what, panel)
    yield "block-fastest", _fastest(slices)
    yield "block-fewer-devices", _fewer()
    yield "block-more-devices", _more()


def _fastest(parts: list[str]) -> Picture:
    plan = replace(BLOCK, weights=(1.0, 1.0, 2.6, 1.0), originals=("fastest",))
    sent = (Sent("gather", pattern="to", device=2), Sent("scatter", pattern="from", device=2))
    return _picture(
        "Block parallel, original layer 3: fastest",
        "The fastest device gets all slices, computes the layer, and gives each its slice back.",
        panel_of(plan, DECOUPLED, (PI, PI, FAST, PI), sent, parts=parts, request=REQUEST),
        f"Device 3 is a Raspberry Pi 5. Alone it would take {seconds_text(_alone_s(FAST))}; marked is the leader, "
        "device 1, alone.",
    )


def _fewer() -> Picture:
    plan = replace(InferencePlan.even("block", 3), originals=("tokens",))
    owners = [part.sub_blocks for part in block_parts(plan, DECOUPLED)]
    owned = [f"slice{'s' if len(own) > 1 else ''} {_span(own)}" for own in owners]
    parts = [f"{own}, {part}" for own, part in zip(owned, _tokens(plan), strict=True)]
    return _picture(
        "Block parallel, four sub-blocks on three devices",
        "One device has two sub-blocks, and the others wait for it where slices meet. Original layer 3: tokens.",
        panel_of(plan, DECOUPLED, PIS[:3], (GATHER, EXCHANGE), parts=parts, request=REQUEST),
    )


def _more() -> Picture:
    plan = replace(BLOCK, originals=("tokens",))
    parts = [
        f"slice {_span(own.sub_blocks)}, heads {_span(share.heads)}"
        for own in block_parts(plan, TWO)
        for _, share in own.held(TWO)
    ]
    return _picture(
        "Block parallel, two sub-blocks on four devices",
        "Two devices have a sub-block together, some heads and MLP columns each, and sum up among themselves.\n"
        "Original layer 3: tokens.",
        panel_of(plan, TWO, PIS, (*(TEAM_SUM,) * 3, TEAM_PARTS, GATHER, EXCHANGE), parts=parts, request=REQUEST),
    )


def _pipeline() -> Picture:
    """All layers, many texts: another axis."""
    spec = SHAPES["bert-base"]
    costs = costs_on(spec, TEXTS, PIS)
    crew, blocks, bands, now_s = Crew(costs), [], [], 0.0
    ticks = [step for step in workload(PIPELINE, spec, TEXTS).after if any(work.mlp_rows for work in step.work)]
    for number, step in enumerate(ticks):
        for device, (cost, work) in enumerate(zip(costs, step.work, strict=True)):
            if work.mlp_rows:
                seconds, text = cost.work_s(work), f"text {number - device + 1}"
                blocks.append(Block(device=device, start_s=now_s, seconds=seconds, kind="layers", labels=(text,)))
                if device + 1 < NUM_DEVICES:
                    bands.append(Band(start_s=now_s + seconds, pattern="next", device=device))
        now_s += crew.step_s(step, [0.0] * NUM_DEVICES)
    sent_bytes = max(step.exchange[0].sent_bytes for step in ticks if step.exchange is not None)
    parts = [f"layers {_span(own)}" for own in layer_ranges(PIPELINE, spec)]
    lanes = lanes_of(PIPELINE, spec, parts, spec.num_layers)
    alone_s = Crew(costs[:1]).steps_s(workload(ONE, spec, TEXTS).steps)
    return Picture(
        title="Pipeline",
        subtitle="Every device computes some layers of one text after the other, and passes each on "
        f"({sent_bytes / 1e3:.0f} kB)\nwhile it computes the next one.",
        panels=(Panel(lanes=lanes, blocks=tuple(blocks), bands=tuple(bands), end_s=now_s),),
        span_s=3.2,
        tick_s=0.5,
        note=f"All 12 layers, 8 texts of 128 tokens: one device takes {seconds_text(alone_s)}. "
        "A single text gains nothing.",
    )


def _generation() -> Picture:
    plain = replace(SHAPES["gpt2"], num_layers=NUM_LAYERS)
    form = replace(plain, num_layers=NUM_LAYERS + 1).decoupled(NUM_DEVICES, (NUM_LAYERS - 1,))
    heads = _heads(plain)
    parts = [f"slice {number + 1}, {part}" for number, part in enumerate(heads)]
    one = panel_of(ONE, plain, (PI,), (), parts=("everything",), request=TOKEN, title="One device")
    tensor = panel_of(TENSOR, plain, PIS, (SUM, SUM) * NUM_LAYERS, parts=heads, request=TOKEN, title="Tensor parallel")
    block = panel_of(
        replace(BLOCK, originals=("tensor",)),
        form,
        PIS,
        (GATHER, SUM, SUM),
        parts=parts,
        request=TOKEN,
        title="Block parallel, original layer 3: tensor",
    )
    return Picture(
        title="One more token of a decoder",
        subtitle="Each token reads all weights once. What is exchanged is so little that only how often it is counts.",
        panels=(one, tensor, block),
        span_s=0.0194,
        tick_s=0.0025,
    )


def _heads(spec: TransformerSpec) -> list[str]:
    return [f"heads {_span(share.heads)}" for share in divide_layer(spec, TENSOR.weights)]


def _tokens(plan: InferencePlan) -> list[str]:
    return [f"tokens {_span(part)}" for part in divide(REQUEST.num_tokens, plan.weights)]


def _span(part: Range) -> str:
    return str(part.stop) if len(part) == 1 else f"{part.start + 1}–{part.stop}"


def main() -> None:
    for name, text in pictures().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
