"""Pieces that are cut where others begin or end: all of each is there, and nothing twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.planning.clusters import BERT, LLAMA
from tests.planning.test_block_steps import decoupled

from isthmus.planning.pieces import Piece, cut, held_bytes, parts_of, pieces_on, resident_bytes
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import LayerShare, Range, TransformerSpec


def ranges(most: int) -> st.SearchStrategy[Range]:
    ends = st.tuples(st.integers(0, most), st.integers(0, most))
    return ends.map(lambda pair: Range(start=min(pair), stop=max(pair)))


@st.composite
def pieces(draw: st.DrawFn, spec: TransformerSpec = BERT) -> Piece:
    return Piece(
        layer=draw(st.integers(0, 1)),
        heads=draw(ranges(spec.num_heads)),
        columns=draw(ranges(40)),
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
        sub_block=draw(st.sampled_from([None, decoupled().sub_block(0), decoupled().sub_block(1)])),
    )


def elements(piece: Piece) -> set[tuple[object, ...]]:
    """Heads and columns of the piece, one by one."""
    where = piece.layer, piece.sub_block, piece.dtype
    heads: set[tuple[object, ...]] = {(*where, "head", number) for number in range(piece.heads.start, piece.heads.stop)}
    return heads | {(*where, "column", number) for number in range(piece.columns.start, piece.columns.stop)}


@given(wanted=st.sets(pieces(), max_size=8))
def test_parts_are_all_of_their_piece_and_overlap_nowhere(wanted: set[Piece]) -> None:
    found = cut(BERT, wanted, is_frugal=True)
    assert found.keys() == wanted
    for piece, parts in found.items():
        own = [elements(part) for part in parts]
        assert set().union(*own) == elements(piece) and sum(map(len, own)) == len(elements(piece))
    kept = [elements(part) for part in parts_of(BERT, wanted, is_frugal=True)]
    assert sum(map(len, kept)) == len(set().union(*kept))


@given(wanted=st.sets(pieces(), max_size=8))
def test_what_is_held_is_every_head_and_column_once(wanted: set[Piece]) -> None:
    wanted = {replace(piece, dtype="fp32", sub_block=None) for piece in wanted}
    every = set().union(*map(elements, wanted))
    bytes_of = {
        "head": 4 * BERT.attention_numel // BERT.num_heads,
        "column": 4 * BERT.mlp_numel // BERT.intermediate_size,
    }
    assert held_bytes(BERT, wanted, is_frugal=True) == sum(bytes_of[str(element[3])] for element in every)


def test_devices_that_are_not_frugal_keep_pieces_whole() -> None:
    whole = Piece.of_layer(0, LayerShare.whole(BERT), "fp32")
    half = replace(whole, heads=Range(start=0, stop=6))
    assert cut(BERT, {whole, half}, is_frugal=False) == {whole: (whole,), half: (half,)}


def test_one_piece_of_a_layer_is_not_cut() -> None:
    plan = InferencePlan.even("tensor", 2)
    wanted = pieces_on(0, (plan, replace(plan, algorithm="mesh")), BERT)
    assert cut(BERT, wanted, is_frugal=True) == {piece: (piece,) for piece in wanted}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 2.0)])
def test_a_part_of_layers_that_are_there_takes_no_memory_more(weights: tuple[float, ...]) -> None:
    spec = decoupled()
    whole, part = (
        InferencePlan(strategy="block", devices=(0, 1), weights=weights, originals=(way,) * 4)
        for way in ("tokens", "tensor")
    )
    assert resident_bytes((whole, part), spec, 2, is_frugal=True) == resident_bytes((whole,), spec, 2, is_frugal=True)
    assert resident_bytes((part,), spec, 2, is_frugal=True) < resident_bytes((whole,), spec, 2, is_frugal=True)


def test_pieces_of_decoders_stay_as_their_kernels_read_them() -> None:
    whole = Piece.of_layer(0, LayerShare.whole(LLAMA), "fp32")
    half = replace(whole, heads=Range(start=0, stop=6))
    assert cut(LLAMA, {whole, half}, is_frugal=True) == {whole: (whole,), half: (half,)}
    assert held_bytes(LLAMA, {whole, half}, is_frugal=True) == whole.num_bytes(LLAMA) + half.num_bytes(LLAMA)
