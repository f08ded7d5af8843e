from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isthmus.models.routing import combine, gather, sort_by_expert

HIDDEN = 4


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Routers' choices, some of them "no expert"."""
    num_experts = draw(st.integers(1, 6))
    num_tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    size = num_tokens * top_k
    values = draw(st.lists(st.integers(0, num_experts), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.int64).view(num_tokens, top_k), num_experts


@given(choices())
def test_every_kept_pair_meets_its_expert_once_in_the_tokens_order(case: tuple[Tensor, int]) -> None:
    index_Tk, num_experts = case
    routing = sort_by_expert(index_Tk, num_experts)
    flat = index_Tk.reshape(-1)
    wanted = [position for expert in range(num_experts) for position in range(len(flat)) if flat[position] == expert]
    assert routing.order_S.tolist() == wanted
    assert routing.token_S.tolist() == [position // index_Tk.shape[1] for position in wanted]
    assert routing.counts_E == [int((flat == expert).sum()) for expert in range(num_experts)]


@given(choices())
def test_combine_adds_each_tokens_rows_and_gives_zero_to_tokens_without(case: tuple[Tensor, int]) -> None:
    index_Tk, num_experts = case
    num_tokens, top_k = index_Tk.shape
    routing = sort_by_expert(index_Tk, num_experts)
    rows_SH = torch.arange(len(routing.order_S) * HIDDEN, dtype=torch.float32).view(-1, HIDDEN)
    wanted_TH = torch.zeros(num_tokens, HIDDEN).index_add_(0, routing.token_S, rows_SH)
    assert torch.equal(combine(rows_SH, routing, num_tokens, top_k), wanted_TH)
    hidden_TH = torch.randn(num_tokens, HIDDEN)
    assert torch.equal(gather(hidden_TH, routing), hidden_TH[routing.token_S])


def test_bf16_sums_are_rounded_once() -> None:
    rows_TH = torch.tensor([[1.0], [2**-9], [2**-9], [2**-8]], dtype=torch.bfloat16)
    routing = sort_by_expert(torch.tensor([[0, 1, 2, 3]]), 4)
    assert combine(rows_TH, routing, 1, 4).item() == 1 + 2**-7


def test_an_index_beyond_no_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="got expert 5, wanted 0 to 3, or 4 for no expert"):
        sort_by_expert(torch.tensor([[0, 5]]), 4)


def test_a_wrong_number_of_tokens_is_refused() -> None:
    routing = sort_by_expert(torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match="num_tokens: got 3, wanted as many as were routed: 2"):
        combine(torch.ones(2, HIDDEN), routing, 3, 1)
