"""Work that nothing waits for yet."""

from __future__ import annotations

from isthmus.tuning.deferred import DeferredWork


def queue(*layers: int) -> tuple[DeferredWork, list[int]]:
    """One task per layer given; the list collects the numbers of those that were done."""
    deferred, done = DeferredWork(), []
    for number, layer in enumerate(layers):
        deferred.add(layer, lambda number=number: done.append(number))
    return deferred, done


def test_tasks_are_done_once_in_the_order_they_were_added() -> None:
    deferred, done = queue(3, 3, 2)
    while deferred.run_one():
        pass
    deferred.run_all()
    assert done == [0, 1, 2]


def test_waiting_takes_no_more_tasks_than_it_needs() -> None:
    deferred, done = queue(3, 3, 3)
    deferred.run_until(lambda: len(done) == 2)
    assert done == [0, 1]
    deferred.run_until(lambda: False)
    assert done == [0, 1, 2], "with nothing left it does not wait"


def test_a_layer_finishes_what_the_layer_before_left_and_no_more() -> None:
    deferred, done = queue(3, 3, 2, 2)
    deferred.run_before(2)
    assert done == [0, 1]
    deferred.run_before(2)
    assert done == [0, 1]
