"""A layer's work cut into what is computed while exchanges go on: its MLP before one, its first product after one.

Both are computed row by row: the MLP of the second portion of the tokens while the first is on its way, queries, keys
and values of the first while the second is. Attention between them needs all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.planning.exchanges import Exchange
from isthmus.planning.steps import Step, Work
from isthmus.spec.transformer import TransformerSpec


def in_portions(
    last: Step, exchanges: tuple[Exchange, Exchange], rows: tuple[Sequence[int], Sequence[int]]
) -> list[Step]:
    """``last``, whose work ends with the MLP of all ``rows`` (of each portion, by device), and the exchange of what it
    has computed, a portion after the other."""
    (first_rows, second_rows), idle = rows, (Work(),) * len(last.work)
    steps: list[Step] = []
    work = last.work
    if last.exchange is not None:  # it comes before the MLP
        steps.append(replace(last, work=tuple(replace(own, mlp_rows=0) for own in work)))
        work = tuple(_mlp(own, own.mlp_rows) for own in work)
    first = tuple(_with_mlp_rows(own, count) for own, count in zip(work, first_rows, strict=True))
    second = tuple(_mlp(own, count) for own, count in zip(work, second_rows, strict=True))
    return [
        *steps,
        Step(work=first, exchange=exchanges[0], meanwhile=second),
        Step(work=idle, exchange=exchanges[1], is_rest=True),
    ]


def begun(
    last: Step, work: Sequence[Work], rows: Sequence[int], spec: TransformerSpec
) -> tuple[Step, tuple[Work, ...]]:
    """``last``, during whose exchange the layer of ``work`` begins with queries, keys and values of ``rows`` (by
    device), and what is left of that work."""
    product = spec.product_share
    meanwhile, left = [], []
    for own, count in zip(work, rows, strict=True):
        attention_rows = round(product * min(count, own.attention_rows))
        block_rows = round(product * min(count, own.block_rows))
        meanwhile.append(
            Work(
                attention_rows=attention_rows,
                attention_share=own.attention_share,
                block_rows=block_rows,
                block_share=own.block_share,
                block_heads=own.block_heads,
                block_columns=0.0,
            )
        )
        left.append(
            replace(
                own,
                attention_rows=own.attention_rows - attention_rows,
                block_rows=own.block_rows - block_rows,
                block_mlp_rows=own.rows_of_block_mlp,
            )
        )
    return replace(last, meanwhile=tuple(meanwhile)), tuple(left)


def _with_mlp_rows(work: Work, rows: int) -> Work:
    return replace(work, mlp_rows=min(rows, work.mlp_rows), block_mlp_rows=min(rows, work.rows_of_block_mlp))


def _mlp(work: Work, rows: int) -> Work:
    """Only the MLP, of so many rows."""
    return Work(
        mlp_rows=min(rows, work.mlp_rows),
        mlp_share=work.mlp_share,
        block_rows=min(rows, work.rows_of_block_mlp),
        block_share=work.block_share,
        block_heads=0.0,
        block_columns=work.block_columns,
    )
