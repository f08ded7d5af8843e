"""In which order a rank takes its micro-batches up: what others wait for leaves first, and nobody waits for nothing."""

from __future__ import annotations

from typing import Any

import torch

from isthmus.tuning.data import MicroBatch
from isthmus.tuning.engine import Group
from isthmus.tuning.pipeline.engine import Journey, PipelineEngine
from isthmus.tuning.tape import Tape


class Awaited:
    """Stands for tensors from another rank, or for experts under way."""

    def __init__(self, is_there: bool) -> None:
        self.is_there = is_there

    def is_here(self) -> bool:
        return self.is_there

    def is_ready(self) -> bool:
        return self.is_there


def group(*, arrival: bool | None = None, experts: bool | None = None) -> Group:
    """A micro-batch that waits for tensors or experts (whether they are there), or for nothing."""
    awaited: Any = None if arrival is None else Awaited(arrival)
    waiting: Any = None if experts is None else Awaited(experts)
    batch = MicroBatch(inputs={"input_ids": torch.zeros(1, 1, dtype=torch.int64)}, num_tokens=1, num_label_tokens=1)
    return Group(runs=[Journey(batch, 1.0, Tape(recording=True), 0, arrival=awaited)], waiting=waiting)


def place(*groups: Group) -> int:
    return list(groups).index(PipelineEngine._going_on(list(groups)))


def test_a_micro_batch_leaves_before_the_next_is_begun() -> None:
    assert place(group(experts=True), group(), group()) == 0
    assert place(group(arrival=True), group(experts=True), group()) == 0


def test_whoever_would_wait_lets_the_others_go_on() -> None:
    assert place(group(arrival=False), group(experts=False), group(arrival=True)) == 2
    assert place(group(experts=False), group()) == 1


def test_where_all_wait_our_own_experts_come_before_messages() -> None:
    assert place(group(arrival=False), group(experts=False), group(experts=False)) == 1
    assert place(group(arrival=False), group(arrival=False)) == 0
