from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.stages import map_stages
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ModelSpec


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
