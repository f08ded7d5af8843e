"""A small model of a training step, so that pictures and traces are tested on something that looks like a run."""

from __future__ import annotations

import random

import pytest

from isthmus.spec.timeline import Span, Timeline


class _Lanes:
    """Each lane does one thing at a time; ``run`` starts it when the lane and what it needs are free."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.free_s: dict[str, float] = {}

    def run(
        self, lane: str, name: str, seconds: float, kind: str, after_s: float = 0.0, waits_for: str = "", **amounts: int
    ) -> float:
        free_s = self.free_s.get(lane, 0.0)
        start_s = max(free_s, after_s)
        if lane == "accelerator" and start_s > free_s + 1e-4:
            self.spans.append(Span(lane=lane, name=f"{name}: {waits_for}", start_s=free_s, end_s=start_s, kind="wait"))
        end_s = start_s + seconds
        self.spans.append(Span(lane=lane, name=name, start_s=start_s, end_s=end_s, kind=kind, **amounts))
        self.free_s[lane] = end_s
        return end_s


def _layer(lanes: _Lanes, rng: random.Random, layer: int, backward: bool) -> None:
    scale, kind = (2.0, "expert_backward") if backward else (1.0, "expert_forward")
    num_loads = rng.randint(2, 4)
    dense_s = lanes.run("accelerator", f"dense L{layer}", 0.004 * scale, "dense", num_tokens=2048)
    sent_s = lanes.run("d2h", f"L{layer} tokens", 0.001, "tokens", dense_s, num_bytes=2_000_000)
    loaded_s = [
        lanes.run("h2d", f"L{layer} E{expert}", 0.0055, "load_expert", num_bytes=11_000_000)
        for expert in range(num_loads)
    ]
    cpu_s = lanes.run(
        "cpu_experts", f"L{layer} experts", rng.uniform(0.008, 0.016) * scale, kind, sent_s, num_tokens=240
    )
    lanes.run("accelerator", f"L{layer} resident experts", 0.003 * scale, kind, num_tokens=2600)
    lanes.run("accelerator", f"L{layer} loaded experts", 0.004 * scale, kind, loaded_s[-1], "loads", num_tokens=1200)
    back_s = lanes.run("h2d", f"L{layer} results", 0.001, "tokens", cpu_s, num_bytes=2_000_000)
    lanes.run("accelerator", f"L{layer} combine", 0.001, "dense", back_s, "CPU experts")
    if backward:
        for expert in range(num_loads):
            lanes.run("d2h", f"L{layer} E{expert} gradient", 0.0055, "gradient", back_s, num_bytes=11_000_000)


def run_like_timeline(num_steps: int = 5, num_layers: int = 4) -> Timeline:
    """Forward and backward over the layers, the optimizer of one step beside the next step's forward."""
    lanes, rng, steps = _Lanes(), random.Random(0), []
    for step in range(num_steps):
        start_s = lanes.free_s.get("accelerator", 0.0)
        for layer in range(num_layers):
            _layer(lanes, rng, layer, backward=False)
        lanes.run("accelerator", "head", 0.004, "dense", num_tokens=2048)
        for layer in reversed(range(num_layers)):
            _layer(lanes, rng, layer, backward=True)
        last_gradient_s = lanes.free_s["d2h"]
        lanes.run("optimizer", "norm", 0.002, "norm", last_gradient_s)
        for layer in range(num_layers):
            lanes.run("optimizer", f"AdamW L{layer}", 0.009, "optimizer")
        steps.append((step, start_s, lanes.free_s["accelerator"]))
    return Timeline(spans=tuple(lanes.spans), steps=tuple(steps))


@pytest.fixture
def run_timeline() -> Timeline:
    return run_like_timeline()
