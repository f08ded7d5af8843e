"""How a Transformer is decoupled: which layers, into how many sub-blocks, how wide their slices are.

A decoupled layer replaces one Transformer layer by independent sub-blocks; each sees and writes its own slice of the
hidden units (DeTransformer, DATE 2024, section III: block parallelism). Layers are counted from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from isthmus.spec.errors import IsthmusError

Heads = Literal["all", "own"]
"""``all``, as published: every sub-block has all attention heads, computed from its slice (the projections are
w → H·d). ``own``: every sub-block has its share of the heads (w → w), so that keys, values and the KV cache of all
sub-blocks together are those of one layer; it has fewer parameters and is not the published form."""


@dataclass(frozen=True, kw_only=True)
class Decoupling:
    """``original_layers`` stay as they are and mix all slices; the others are decoupled."""

    num_sub_blocks: int
    original_layers: tuple[int, ...]
    widths: tuple[int, ...]
    """Hidden units of each slice, in order; their sum is the hidden size."""
    heads: Heads = "all"


def decoupling(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    num_sub_blocks: int,
    original_layers: Sequence[int],
    widths: Sequence[int] | None = None,
    heads: str = "all",
) -> Decoupling:
    """What was asked, checked against the model's sizes. Raises ``IsthmusError`` that names what does not fit."""
    if num_sub_blocks < 2:
        raise IsthmusError(f"sub_blocks: got {num_sub_blocks}, wanted 2 or more: one is the model as it is")
    if heads not in get_args(Heads):
        raise IsthmusError(f"heads: got {heads!r}, wanted {' or '.join(get_args(Heads))}")
    originals = tuple(sorted(set(original_layers)))
    if originals and not (originals[0] >= 0 and originals[-1] < num_layers):
        raise IsthmusError(
            f"original_layers: got {', '.join(map(str, originals))}, wanted layers from 0 to {num_layers - 1}"
        )
    if len(originals) == num_layers:
        raise IsthmusError(f"original_layers: all {num_layers} layers are original, so none is left to decouple")
    slices = _widths(hidden_size, num_sub_blocks, widths)
    if heads == "own":
        for name, count in (("attention heads", num_heads), ("key/value heads", num_kv_heads)):
            if count % num_sub_blocks:
                raise IsthmusError(
                    f"sub_blocks: {count} {name} cannot be shared out evenly among {num_sub_blocks} sub-blocks; "
                    "take --heads all, or a number that divides them"
                )
        if len(set(slices)) > 1:
            raise IsthmusError("widths: sub-blocks with heads of their own are all of one width; take --heads all")
    return Decoupling(num_sub_blocks=num_sub_blocks, original_layers=originals, widths=slices, heads=heads)  # type: ignore[arg-type]


def original_layers_of(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """The last layer of each of ``num_groups`` groups of consecutive layers, as even as can be (N_b in the paper).

    Raises ``IsthmusError`` for more groups than layers, or as many: nothing would be decoupled.
    """
    if num_groups < 1:
        raise IsthmusError(f"groups: got {num_groups}, wanted 1 or more")
    if num_groups > num_layers:
        raise IsthmusError(f"groups: got {num_groups} for {num_layers} layers, wanted at most {num_layers // 2}")
    if num_groups == num_layers:
        raise IsthmusError(
            f"groups: got {num_groups} for {num_layers} layers: every group ends with an original layer, so none would "
            f"be decoupled; wanted at most {num_layers // 2}"
        )
    return tuple((group + 1) * num_layers // num_groups - 1 for group in range(num_groups))


def default_num_groups(num_layers: int) -> int:
    """Groups where nothing is asked: one for every three layers."""
    return max(1, num_layers // 3)


def proportional_widths(hidden_size: int, shares: Sequence[float], multiple: int = 8) -> tuple[int, ...]:
    """Widths in proportion to ``shares``, each a multiple of ``multiple`` hidden units, none empty; they sum to the
    hidden size. Largest remainders are rounded up. Raises ``IsthmusError`` where it cannot be."""
    if any(not share > 0 for share in shares):
        raise IsthmusError(f"widths: got shares {', '.join(map(str, shares))}, wanted numbers above 0")
    units = hidden_size // multiple
    if hidden_size % multiple or units < len(shares):
        raise IsthmusError(
            f"widths: {hidden_size} hidden units cannot be cut into {len(shares)} slices of a multiple of {multiple}"
        )
    exact = [share / sum(shares) * units for share in shares]
    counts = [max(1, int(value)) for value in exact]
    while sum(counts) != units:
        step = 1 if sum(counts) < units else -1
        candidates = [index for index, count in enumerate(counts) if count + step >= 1]
        index = max(candidates, key=lambda index: step * (exact[index] - counts[index]))
        counts[index] += step
    return tuple(count * multiple for count in counts)


def _widths(hidden_size: int, num_sub_blocks: int, widths: Sequence[int] | None) -> tuple[int, ...]:
    if widths is None:
        if hidden_size % num_sub_blocks:
            raise IsthmusError(
                f"sub_blocks: a hidden size of {hidden_size} cannot be cut into {num_sub_blocks} equal slices; ask for "
                "uneven ones with --widths, such as --widths "
                + ",".join(["1"] * num_sub_blocks)
                + ", or another number"
            )
        return (hidden_size // num_sub_blocks,) * num_sub_blocks
    if len(widths) != num_sub_blocks or sum(widths) != hidden_size or min(widths) < 1:
        raise IsthmusError(
            f"widths: got {', '.join(map(str, widths))}, wanted {num_sub_blocks} that add up to {hidden_size}"
        )
    return tuple(widths)
