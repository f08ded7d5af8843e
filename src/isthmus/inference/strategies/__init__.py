"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    known: Sequence[LocalModel] = (),
) -> Strategy:
    """Reads what this device needs under ``plan`` and makes its strategy. ``group`` holds the plan's devices, in their
    order, and is None for one. What one of ``known`` has read already is not read again."""
    codec = None if plan.codec == "fp32" else plan.codec
    share = LayerShare.whole(reader.spec)
    if plan.strategy == "tensor":
        assert group is not None
        share = divide_layer(reader.spec, plan.weights)[group.rank]
    model = next((model for model in known if model.share == share and model.dtype == plan.dtype), None)
    if model is None:
        model = LocalModel(reader, share, plan.dtype, progress=progress)
    if plan.strategy == "tensor":
        return TensorParallel(model, group, codec=codec, algorithm=plan.algorithm)
    if plan.strategy == "sequence":
        assert group is not None
        return SequenceParallel(model, group, weights=plan.weights, codec=codec)
    return TensorParallel(model, None)
