"""In which order a pipeline goes round the accelerators of a host: neighbours load at the same time, so they should do
it through different PCIe roots (APTMoE, section 3).

Of all orders the one with the fewest neighbours under one root, the last and the first counted as neighbours too; of
those one whose last and first are under one root where some must be, since they meet once a round less than others; of
those the first by numbers. So 0, 1, 2, … stays as it is where nothing is better: under one root, under as many roots as
accelerators, and where roots are not known.

Both wishes can be had at once. Of n accelerators, m under the fullest root, no less than 2m - n neighbours round the
ring are under one root, and no less than 2m - n - 1 in the row without its closing pair. With 2m <= n the ring needs
none; with more, the best rows begin and end under that root, and so are the best rings too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence


def order_by_roots(roots: Sequence[Hashable | None], num_wanted: int | None = None) -> list[int]:
    """Numbers of the accelerators, in the order in which they are neighbours. ``roots``: each one's root; where one is
    not known (None) the order is that of numbers. ``num_wanted``: so many are taken, from all roots as evenly as can
    be, of each root those with the least numbers; None: all.

    Pure. Raises ``ValueError`` for more than there are.
    """
    number = len(roots) if num_wanted is None else num_wanted
    if not 0 <= number <= len(roots):
        raise ValueError(f"num_wanted: got {number}, wanted 0 to {len(roots)}, the accelerators there are")
    if None in roots:
        return list(range(number))
    queues = _queues(roots, number)
    counts = Counter({root: len(queue) for root, queue in queues.items()})
    has_free_ring = 2 * max(counts.values(), default=0) <= number
    alike_left = _fewest_alike(counts, None, None)
    order: list[int] = []
    last: Hashable | None = None
    while queues:
        for root in sorted(queues, key=lambda root: queues[root][0]):
            closing = (roots[order[0]] if order else root) if has_free_ring else None
            left = counts - Counter([root])
            if (root == last) + _fewest_alike(left, root, closing) <= alike_left:
                break
        else:
            raise AssertionError("the row so far can be gone on with as well as it was begun")
        alike_left -= root == last
        counts, last = left, root
        order.append(queues[root].popleft())
        if not queues[root]:
            del queues[root]
    return order


def _queues(roots: Sequence[Hashable | None], number: int) -> dict[Hashable | None, deque[int]]:
    """So many accelerators by root: the last under the fullest root is left out as long as there are too many."""
    queues: dict[Hashable | None, deque[int]] = {}
    for one, root in enumerate(roots):
        queues.setdefault(root, deque()).append(one)
    for _ in range(len(roots) - number):
        fullest = max(queues.values(), key=lambda queue: (len(queue), queue[-1] if queue else -1))
        fullest.pop()
    return {root: queue for root, queue in queues.items() if queue}


def _fewest_alike(counts: Counter[Hashable | None], first: Hashable | None, last: Hashable | None) -> int:
    """How many neighbours are under one root at least, in a row of accelerators of which ``counts`` are under each,
    behind one under ``first`` and before one under ``last`` (None: nothing is there).

    A root's accelerators lie in runs, with others between two runs: so there is at most one run more than others, and
    one less for each end that is another's. All but the first of a run have a neighbour alike. Only one root can have
    more accelerators than runs, and what it has too many is all that cannot be helped (the tests try all ways).
    """
    ends = [end for end in (first, last) if end is not None]
    length = counts.total() + len(ends)
    most = 0
    for root in {*counts, *ends}:
        own, own_ends = counts[root] + ends.count(root), ends.count(root)
        num_runs = length - own + 1 - (len(ends) - own_ends)
        most = max(most, own - num_runs)
    return most
