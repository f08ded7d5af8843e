"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy
from isthmus.inference.strategies.block_parallel import BlockParallel
from isthmus.inference.strategies.pipeline import Pipeline
from isthmus.inference.strategies.scattered_tensor import ScatteredTensorParallel
from isthmus.inference.strategies.sequence_parallel import SequenceParallel
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import BlockLayout, block_parts
from isthmus.planning.original_ways import layer_codecs, original_shares
from isthmus.planning.pieces import Piece
from isthmus.planning.workload import device_shares, layer_ranges
from isthmus.spec.inference import InferencePlan
from isthmus.transport.base import Group


def make_strategy(
    plan: InferencePlan,
    reader: ShardReader,
    group: Group | None,
    progress: Callable[[float], None] = lambda share: None,
    known: dict[Piece, Layer] | None = None,
    mates: Group | None = None,
    kept: Mapping[Piece, tuple[Piece, ...]] | None = None,
) -> Strategy:
    """Reads what this device needs under ``plan`` and makes its strategy. ``group`` holds the plan's devices, in their
    order, and is None for one; ``mates`` those that share sub-blocks with this one (``team_of``), and is None where it
    has them to itself. What ``known`` has is not read again; what is read is added to it. ``kept``: see
    ``LocalModel``."""
    codec = None if plan.codec == "fp32" else plan.codec
    rank = 0 if group is None else group.rank
    spec = reader.spec
    model = LocalModel(
        reader,
        device_shares(plan, spec)[rank],
        plan.dtype,
        layer_range=layer_ranges(plan, spec)[rank],
        block_part=block_parts(plan, spec)[rank],
        original_shares=original_shares(plan, spec)[rank],
        known=known,
        kept=kept,
        progress=progress,
    )
    if spec.decoupling is not None:
        codecs = [None if name == "fp32" else name for name in layer_codecs(plan, spec)]
        return BlockParallel(
            model,
            group,
            layout=BlockLayout.of(plan, spec),
            mates=mates,
            originals=plan.originals,
            codecs=codecs,
            overlaps=plan.overlaps,
        )
    if group is None:
        return TensorParallel(model, None)
    if plan.strategy == "sequence":
        return SequenceParallel(model, group, weights=plan.weights, codec=codec)
    if plan.strategy == "pipeline":
        return Pipeline(model, group, codec=codec)
    if plan.algorithm == "scatter":
        return ScatteredTensorParallel(model, group, weights=plan.weights, codec=codec)
    return TensorParallel(model, group, codec=codec, algorithm=plan.algorithm)
