"""Which rows go to which expert, and the way back: the bookkeeping between tokens and routed pairs.

Legend: ``T`` tokens, ``k`` choices per token, ``H`` hidden size, ``E`` experts, ``S`` routed pairs (token, choice) that
were not dropped, sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The routed pairs of some tokens, sorted by expert, pairs of one expert in the tokens' order. Index tensors are
    int64, on the device of the router's choices."""

    order_S: Tensor
    """Position of each pair in the flattened (T, k) choices."""
    token_S: Tensor
    """The pair's token."""
    row_S: Tensor
    """The inverse: the sorted row of each pair that was not dropped, in the flattened choices' order."""
    bag_T: Tensor
    """Where each token's pairs begin in ``row_S``."""
    counts_E: list[int]
    """Rows of each expert: its pairs and, after ``pad_rows``, rows of no pair. They add up to S."""
    place_S: Tensor | None = None
    """The row of each pair in ``order_S``; None: pair ``i`` has row ``i``."""


def count_by_expert(top_k_index_Tk: Tensor, num_experts: int) -> list[int]:
    """Pairs of each expert. Blocks, once, until the indices are known on the host. Raises ``ValueError`` as
    ``sort_by_expert`` does, on CPUs."""
    index = top_k_index_Tk.reshape(-1)
    if not index.is_cuda:
        counts = torch.bincount(index, minlength=num_experts + 1).tolist()
        if len(counts) > num_experts + 1:
            raise ValueError(
                f"top_k_index_Tk: got expert {len(counts) - 1}, wanted 0 to {num_experts - 1}, "
                f"or {num_experts} for no expert"
            )
    else:
        # bincount looks for the least and the largest index first, and waits for each of them.
        counts = index.new_zeros(num_experts + 1).scatter_add_(0, index, torch.ones_like(index)).tolist()
    return counts[:num_experts]


def sort_by_expert(top_k_index_Tk: Tensor, num_experts: int, counts_E: list[int] | None = None) -> Routing:
    """Sorts the routed pairs by expert, stably. ``top_k_index_Tk``: integers 0 … ``num_experts``.

    An index equal to ``num_experts`` means "no expert": the pair is dropped. ``counts_E``: the pairs of each expert
    where they are known already; nothing blocks then, and the indices must be right. Otherwise blocks until the indices
    are known on the host, and raises ``ValueError`` for other indices.
    """
    num_tokens, top_k = top_k_index_Tk.shape
    index = top_k_index_Tk.reshape(-1)
    counts_E = count_by_expert(top_k_index_Tk, num_experts) if counts_E is None else counts_E
    order = torch.sort(index, stable=True).indices
    num_rows = sum(counts_E)
    order_S = order[:num_rows]
    rows = torch.arange(num_rows, device=order.device)
    if num_rows == len(order):
        row_S = torch.empty_like(order).scatter_(0, order, rows)
        bag_T = torch.arange(0, num_rows, top_k, device=order.device) if top_k else order.new_zeros(num_tokens)
    else:
        is_kept = index != num_experts
        # inverse[is_kept], but a mask as an index would wait for the number of its ones.
        place_among_kept = is_kept.cumsum(dim=0) - 1
        row_S = torch.empty_like(order_S).scatter_(0, place_among_kept[order_S], rows)
        kept_T = is_kept.view(num_tokens, top_k).sum(dim=1)
        bag_T = kept_T.cumsum(dim=0) - kept_T
    token_S = order_S.div(top_k, rounding_mode="floor") if top_k else order_S
    return Routing(order_S=order_S, token_S=token_S, row_S=row_S, bag_T=bag_T, counts_E=counts_E)


def pad_rows(routing: Routing, multiple: int) -> Routing:
    """The same pairs, each expert's rows filled up to a multiple of ``multiple`` with rows of no pair.

    Those repeat token 0; their weight is 0 (``weights_of``), so that they add nothing to any gradient. On CPUs a bf16
    GEMM of a size that was not met before is compiled first, about 1 ms: with few sizes that happens once each.
    """
    if multiple == 1:
        return routing
    counts = torch.tensor(routing.counts_E)
    padded = (counts + multiple - 1).div(multiple, rounding_mode="floor") * multiple
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place_S = torch.arange(len(routing.order_S)) + shift.repeat_interleave(counts)
    token_S = torch.zeros(int(padded.sum()), dtype=torch.int64)
    token_S[place_S] = routing.token_S
    return replace(routing, token_S=token_S, row_S=place_S[routing.row_S], counts_E=padded.tolist(), place_S=place_S)


def weights_of(weights_Tk: Tensor, routing: Routing) -> Tensor:
    """The weight (S,) of each row; 0 for rows of no pair."""
    weights = weights_Tk.reshape(-1)[routing.order_S]
    if routing.place_S is None:
        return weights
    return weights.new_zeros(len(routing.token_S)).index_copy_(0, routing.place_S, weights)


def weight_gradients_of(gradients_S: Tensor, routing: Routing, num_tokens: int, top_k: int) -> Tensor:
    """The transpose (T, k) of ``weights_of``."""
    of_pairs = gradients_S if routing.place_S is None else gradients_S[routing.place_S]
    gradients = of_pairs.new_zeros(num_tokens * top_k)
    gradients[routing.order_S] = of_pairs
    return gradients.view(num_tokens, top_k)


def gather(rows_TH: Tensor, routing: Routing) -> Tensor:
    """The row (S, H) of each pair's token: inputs of the experts, or gradients of their weighted outputs."""
    return rows_TH.index_select(0, routing.token_S)


def combine(rows_SH: Tensor, routing: Routing, num_tokens: int, top_k: int) -> Tensor:
    """Sum (T, H) of each token's rows, zero for a token without any: the transpose of ``gather``.

    Deterministic: each sum runs over the token's choices in their order, in FP32 whatever the dtype, rounded once.
    """
    if routing.bag_T.shape[0] != num_tokens:
        raise ValueError(f"num_tokens: got {num_tokens}, wanted as many as were routed: {routing.bag_T.shape[0]}")
    if top_k == 1 and rows_SH.shape[0] == num_tokens:
        return rows_SH.index_select(0, routing.row_S)
    # Two to seven times as fast as index_add_ or gather, view and sum on CPUs: no (T, k, H) buffer, FP32 inside.
    return F.embedding_bag(routing.row_S, rows_SH, routing.bag_T, mode="sum")
