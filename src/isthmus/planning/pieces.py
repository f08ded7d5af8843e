"""What the devices of a plan hold of the model's layers, piece by piece: plans that share a piece keep it once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from isthmus.planning.block_layout import BlockPart, block_parts
from isthmus.planning.device_costs import weight_bytes
from isthmus.planning.original_ways import original_shares
from isthmus.planning.workload import device_shares, layer_ranges
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import LayerShare, Range, SubBlock, TransformerSpec


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Heads and MLP columns of one layer, or of its ``sub_block``, in ``dtype``."""

    layer: int
    heads: Range
    columns: Range
    dtype: str
    sub_block: SubBlock | None = None

    @staticmethod
    def of_layer(layer: int, share: LayerShare, dtype: str) -> Piece:
        return Piece(layer=layer, heads=share.heads, columns=share.columns, dtype=dtype)

    @staticmethod
    def of_sub_block(layer: int, sub_block: SubBlock, share: LayerShare, dtype: str) -> Piece:
        return Piece(layer=layer, heads=share.heads, columns=share.columns, dtype=dtype, sub_block=sub_block)

    def num_bytes(self, spec: TransformerSpec) -> int:
        """Of its matrices as a device keeps them."""
        nothing = Range(start=0, stop=0)
        share = LayerShare(heads=self.heads, columns=self.columns, vocabulary=nothing)
        return weight_bytes(spec, share, self.dtype, 1, self.sub_block)


def _by_device(
    plan: InferencePlan, spec: TransformerSpec
) -> Iterator[tuple[LayerShare, Range, BlockPart, dict[int, LayerShare | None]]]:
    """Its share of layers that are not decoupled, its layers, its sub-blocks, and what is other in original layers."""
    return zip(
        device_shares(plan, spec),
        layer_ranges(plan, spec),
        block_parts(plan, spec),
        original_shares(plan, spec),
        strict=True,
    )


def pieces_of(plan: InferencePlan, spec: TransformerSpec) -> list[tuple[Piece, ...]]:
    """By device, in the plan's order."""
    found = []
    for share, layers, part, originals in _by_device(plan, spec):
        blocks = part.held(spec)
        pieces: list[Piece] = []
        for layer in range(layers.start, layers.stop):
            if spec.is_decoupled(layer):
                pieces += [Piece.of_sub_block(layer, block, of_it, plan.dtype) for block, of_it in blocks]
            elif (own := originals.get(layer, share)) is not None:
                pieces.append(Piece.of_layer(layer, own, plan.dtype))
        found.append(tuple(pieces))
    return found


def held_bytes(spec: TransformerSpec, pieces: Iterable[Piece]) -> int:
    """Of all of them, each counted once."""
    return sum(piece.num_bytes(spec) for piece in set(pieces))


def weights_bytes(plan: InferencePlan, spec: TransformerSpec) -> list[int]:
    """``held_bytes`` of ``pieces_of`` each device, in the plan's order, without listing them."""
    found = []
    for share, layers, part, originals in _by_device(plan, spec):
        own = [number for number in range(layers.start, layers.stop) if not spec.is_decoupled(number)]
        shares = Counter(originals.get(number, share) for number in own)
        total = sum(
            count * weight_bytes(spec, each, plan.dtype, 1) for each, count in shares.items() if each is not None
        )
        if len(own) < len(layers):
            blocks = (weight_bytes(spec, of_it, plan.dtype, 1, block) for block, of_it in part.held(spec))
            total += (len(layers) - len(own)) * sum(blocks)
        found.append(total)
    return found


def resident_bytes(plans: Iterable[InferencePlan], spec: TransformerSpec, num_devices: int) -> list[int]:
    """Of the weights of all ``plans`` together on each of ``num_devices``, by rank."""
    held: list[set[Piece]] = [set() for _ in range(num_devices)]
    for plan in plans:
        for rank, pieces in zip(plan.devices, pieces_of(plan, spec), strict=True):
            held[rank].update(pieces)
    return [held_bytes(spec, pieces) for pieces in held]
