"""What the devices of a plan hold of the model's layers, piece by piece: plans that share a piece keep it once,
and on frugal devices what pieces have in common too."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from isthmus.planning.block_layout import BlockPart, block_parts
from isthmus.planning.device_costs import weight_bytes
from isthmus.planning.original_ways import original_shares
from isthmus.planning.workload import device_shares, layer_ranges
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import LayerShare, Range, SubBlock, TransformerSpec

_NOTHING = Range(start=0, stop=0)


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
        share = LayerShare(heads=self.heads, columns=self.columns, vocabulary=_NOTHING)
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


def can_be_cut(spec: TransformerSpec) -> bool:
    """Whether a layer may be kept in parts. A decoder keeps its matrices as ``decode.c`` reads them, in one."""
    return not spec.is_decoder and spec.heads_per_kv_head == 1


def cut(spec: TransformerSpec, pieces: Iterable[Piece], *, is_frugal: bool) -> dict[Piece, tuple[Piece, ...]]:
    """What to keep for each of ``pieces``: itself or, on devices that are frugal (``Question.is_frugal``), parts of it
    of which others consist too: what is kept for all of them then overlaps nowhere. A layer that is cut is so into
    heads alone and columns alone, each in order."""
    alike: dict[tuple[object, ...], set[Piece]] = defaultdict(set)
    for piece in pieces:
        alike[(piece.layer, piece.sub_block, piece.dtype) if is_frugal and can_be_cut(spec) else (piece,)].add(piece)
    found: dict[Piece, tuple[Piece, ...]] = {}
    for own in alike.values():
        if len(own) == 1:
            found |= {piece: (piece,) for piece in own}
            continue
        heads, columns = (
            sorted({end for part in parts for end in (part.start, part.stop)})
            for parts in (
                [piece.heads for piece in own],
                [piece.columns for piece in own],
            )
        )
        for piece in own:
            parts = [replace(piece, heads=part, columns=_NOTHING) for part in _between(heads, piece.heads)]
            parts += [replace(piece, heads=_NOTHING, columns=part) for part in _between(columns, piece.columns)]
            found[piece] = tuple(parts) or (piece,)
    return found


def _between(ends: list[int], whole: Range) -> Iterator[Range]:
    """``whole``, cut at those of ``ends`` that lie in it; nothing where it is empty."""
    own = ends[bisect_right(ends, whole.start) - 1 : bisect_right(ends, whole.stop)]
    return (Range(start=start, stop=stop) for start, stop in pairwise(own)) if len(whole) else iter(())


def pieces_on(rank: int, plans: Iterable[InferencePlan], spec: TransformerSpec) -> set[Piece]:
    """What all ``plans`` need on that device."""
    found: set[Piece] = set()
    for plan in plans:
        if rank in plan.devices:
            found.update(pieces_of(plan, spec)[plan.devices.index(rank)])
    return found


def parts_of(spec: TransformerSpec, pieces: Iterable[Piece], *, is_frugal: bool) -> set[Piece]:
    """What is kept for all of them (``cut``)."""
    return {part for parts in cut(spec, pieces, is_frugal=is_frugal).values() for part in parts}


def held_bytes(spec: TransformerSpec, pieces: Iterable[Piece], *, is_frugal: bool = False) -> int:
    """Of what is kept for all of them, each piece once."""
    return sum(part.num_bytes(spec) for part in parts_of(spec, pieces, is_frugal=is_frugal))


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


def resident_bytes(
    plans: Sequence[InferencePlan], spec: TransformerSpec, num_devices: int, *, is_frugal: bool = False
) -> list[int]:
    """Of the weights of all ``plans`` together on each of ``num_devices``, by rank."""
    return [held_bytes(spec, pieces_on(rank, plans, spec), is_frugal=is_frugal) for rank in range(num_devices)]
