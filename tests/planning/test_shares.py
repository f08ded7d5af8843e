"""Dividing tokens, heads and columns: nothing is lost, nothing twice, and nobody gets more than it should."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.shares import divide, divide_layer
from isthmus.spec.transformer import Range, TransformerSpec

WEIGHTS = st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda weights: sum(weights) > 0.01)


def spec(num_heads: int = 12, num_kv_heads: int = 12, intermediate_size: int = 3072) -> TransformerSpec:
    return TransformerSpec(
        model_type="llama",
        is_decoder=True,
        num_layers=2,
        hidden_size=64 * num_heads,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=64,
        intermediate_size=intermediate_size,
        vocab_size=1000,
        max_num_tokens=64,
        activation="silu",
        has_gate=True,
        norm="rms",
        norm_epsilon=1e-6,
        norm_first=True,
        has_rotary=True,
    )


def assert_covers(ranges: list[Range], total: int) -> None:
    assert ranges[0].start == 0 and ranges[-1].stop == total
    for before, after in pairwise(ranges):
        assert before.stop == after.start and before.start <= before.stop


@given(total=st.integers(0, 500), weights=WEIGHTS, unit=st.integers(1, 9))
def test_ranges_cover_everything_once_and_keep_to_the_quota(total: int, weights: list[float], unit: int) -> None:
    ranges = divide(total, weights, unit=unit)
    assert_covers(ranges, total)
    num_units = -(-total // unit)
    for part, weight in zip(ranges, weights, strict=True):
        quota = num_units * weight / sum(weights)
        assert abs(-(-len(part) // unit) - quota) < 1 + 1e-9
        assert part.start % unit == 0 or not len(part)


@given(weights=WEIGHTS, groups=st.sampled_from([(12, 12), (12, 4), (8, 2), (4, 1)]))
def test_shares_of_a_layer_cover_it(weights: list[float], groups: tuple[int, int]) -> None:
    model = spec(*groups)
    shares = divide_layer(model, weights)
    assert_covers([share.heads for share in shares], model.num_heads)
    assert_covers([share.columns for share in shares], model.intermediate_size)
    assert_covers([share.vocabulary for share in shares], model.vocab_size)
    for share in shares:
        kv = share.kv_heads(model)
        used = {head // model.heads_per_kv_head for head in range(share.heads.start, share.heads.stop)}
        assert used == set(range(kv.start, kv.stop))


def test_columns_make_good_what_heads_cannot_balance() -> None:
    model = spec(num_heads=4, num_kv_heads=4, intermediate_size=4096)
    work = [
        len(share.heads) * model.attention_numel / model.num_heads
        + len(share.columns) * model.mlp_numel / model.intermediate_size
        for share in divide_layer(model, (1.0, 1.0, 1.0))
    ]
    assert [len(share.heads) for share in divide_layer(model, (1.0, 1.0, 1.0))] == [2, 1, 1]
    assert max(work) <= 1.01 * sum(work) / 3


@pytest.mark.parametrize(("total", "weights"), [(-1, (1.0,)), (5, (0.0, 0.0)), (5, (1.0, -1.0))])
def test_what_cannot_be_divided_is_refused(total: int, weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="wanted shares that sum up"):
        divide(total, weights)
