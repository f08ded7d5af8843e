from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.stages import Division, divide, map_stages
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import OUTER_LAYER, ModelSpec


def sizes(spec: ModelSpec, **arguments: int) -> list[int]:
    return [stage.last_layer - stage.first_layer + 1 for stage in map_stages(spec, **{"num_slots": 8, **arguments})]


@given(num_stages=st.integers(1, 6), dense=st.lists(st.integers(0, 5000), min_size=6, max_size=6))
def test_stages_cover_all_layers_in_order(num_stages: int, dense: list[int]) -> None:
    spec = ModelSpec(
        model_type="tiny",
        architecture="Tiny",
        is_encoder_decoder=False,
        num_layers=6,
        hidden_size=8,
        vocab_size=32,
        layers=(None,) * 6,
        dense_numel=tuple(dense),
        outer_numel=0,
    )
    stages = map_stages(spec, num_slots=1, num_stages=num_stages)
    assert len(stages) == num_stages
    assert [n for stage in stages for n in range(stage.first_layer, stage.last_layer + 1)] == list(range(6))


def test_equal_layers_make_equal_stages(spec: ModelSpec) -> None:
    assert sizes(spec, num_stages=3) == [2, 2, 2]
    assert sizes(spec, num_stages=4) in (
        [2, 2, 1, 1],
        [2, 1, 2, 1],
        [1, 2, 2, 1],
        [2, 1, 1, 2],
        [1, 2, 1, 2],
        [1, 1, 2, 2],
    )


def test_a_heavy_layer_stands_alone(spec: ModelSpec) -> None:
    heavy = dataclasses.replace(spec, dense_numel=(10**6, 1, 1, 1, 1, 1))
    assert sizes(heavy, num_stages=2) == [1, 5]


@pytest.mark.parametrize(("num_slots", "expected"), [(20, 1), (19, 3), (16, 3), (12, 4), (8, 5), (7, 6), (1, 6)])
def test_by_default_two_neighbouring_stages_fit_the_slots_in_as_few_stages_as_can_be(
    spec: ModelSpec, num_slots: int, expected: int
) -> None:
    """Five layers of four experts after a dense one of the same size: three stages hold 4, 8 and 8 experts."""
    assert len(map_stages(spec, num_slots=num_slots)) == expected


def test_more_stages_than_layers_are_refused(spec: ModelSpec) -> None:
    for number in (0, 7):
        with pytest.raises(IsthmusError, match=rf"num_stages: got {number}, wanted 1 to 6, the number of layers"):
            map_stages(spec, num_slots=8, num_stages=number)


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(2, 2), (2, 5), (3, 4), (4, 6)])
def test_every_layer_is_one_processes_and_neighbouring_stages_are_not_the_same_ones(
    num_ranks: int, num_stages: int, spec: ModelSpec
) -> None:
    division = divide(spec, num_ranks=num_ranks, num_stages=num_stages)
    owned = [layer for rank in range(num_ranks) for layer in division.layers_of(rank)]
    assert sorted(owned) == list(range(6))
    assert all(division.rank_of(layer) == rank for rank in range(num_ranks) for layer in division.layers_of(rank))
    assert division.rank_of(0) == division.rank_of(OUTER_LAYER) == 0
    ends = [stage.last_layer for stage in division.stages[:-1]]
    assert all(division.rank_of(end) != division.rank_of(end + 1) for end in ends)


def test_stages_go_round_in_the_order_that_is_asked_for(spec: ModelSpec) -> None:
    stages = divide(spec, num_ranks=3, num_stages=6).stages
    division = Division(stages=stages, num_ranks=3, order=(0, 2, 1))
    assert division.ranks == (0, 2, 1, 0, 2, 1) and division.stages_of(2) == stages[1::3]
    assert all(division.rank_of(layer) == rank for rank in range(3) for layer in division.layers_of(rank))
    with pytest.raises(ValueError, match=r"order: got \(1, 0, 2\), wanted all of 3 ranks, rank 0 first"):
        Division(stages=stages, num_ranks=3, order=(1, 0, 2))


def test_each_process_gets_two_stages_where_there_are_layers_for_it(spec: ModelSpec) -> None:
    assert [len(divide(spec, num_ranks=num_ranks).stages) for num_ranks in (2, 3, 4, 6)] == [4, 6, 4, 6]


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(3, 2), (7, None)])
def test_more_processes_than_stages_are_refused(num_ranks: int, num_stages: int | None, spec: ModelSpec) -> None:
    with pytest.raises(
        IsthmusError, match=f"num_stages: got . for {num_ranks} processes, wanted at least one stage each"
    ):
        divide(spec, num_ranks=num_ranks, num_stages=num_stages)


def test_parts_of_a_model_make_the_whole(spec: ModelSpec) -> None:
    division = divide(spec, num_ranks=2)
    parts = [spec.part(division.layers_of(rank), has_outer=rank == 0) for rank in range(2)]
    assert sum(part.num_parameters for part in parts) == spec.num_parameters
    assert sorted(layer for part in parts for layer in part.moe_layers) == list(spec.moe_layers)
    assert sum(part.num_held_layers for part in parts) == spec.num_layers
