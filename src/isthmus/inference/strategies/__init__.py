"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy
from isthmus.inference.strategies.sequence_parallel import SequenceParallel
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.models.shards import ShardReader
from isthmus.planning.shares import divide_layer
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import LayerShare
from isthmus.transport.base import Group


def make_strategy(
    plan: InferencePlan,
    reader: ShardReader,
    group: Group | None,
    progress: Callable[[float], None] = lambda share: None,
) -> Strategy:
    """Reads what this device needs under ``plan`` and makes its strategy. ``group`` holds the plan's devices, in their
    order, and is None for one."""
    codec = None if plan.codec == "fp32" else plan.codec
    if plan.strategy == "tensor":
        assert group is not None
        share = divide_layer(reader.spec, plan.weights)[group.rank]
        model = LocalModel(reader, share, plan.dtype, progress=progress)
        return TensorParallel(model, group, codec=codec, algorithm=plan.algorithm)
    model = LocalModel(reader, LayerShare.whole(reader.spec), plan.dtype, progress=progress)
    if plan.strategy == "sequence":
        assert group is not None
        return SequenceParallel(model, group, weights=plan.weights, codec=codec)
    return TensorParallel(model, None)
