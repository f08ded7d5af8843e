"""Ranks for the tests: each a thread of this process with a group of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from isthmus.transport.base import Group
from isthmus.transport.errors import TransportError
from isthmus.transport.gloo import GlooGroup
from isthmus.transport.local import create_local_groups
from isthmus.transport.rendezvous import listen
from isthmus.transport.sockets import SocketGroup

KINDS = ("local", "sockets", "gloo")
NETWORK_KINDS = ("sockets", "gloo")
CLASSES: dict[str, Any] = {"sockets": SocketGroup, "gloo": GlooGroup}


def run_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs all at once and returns what each returned, or the exception that it raised."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def outcomes(kind: str, world_size: int, body: Callable[[Any], Any], *, timeout_s: float = 60.0) -> list[Any]:
    """What ``body(group)`` returned or raised, rank by rank. All groups are closed afterwards."""
    if kind == "local":
        groups = create_local_groups(world_size, timeout_s=timeout_s)
        return run_threads([lambda group=group: within(group, body) for group in groups])
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]

        def run(rank: int) -> Any:
            group = CLASSES[kind].connect(
                rank=rank,
                world_size=world_size,
                port=port,
                timeout_s=timeout_s,
                listener=listener if rank == 0 else None,
            )
            return within(group, body)

        return run_threads([lambda rank=rank: run(rank) for rank in range(world_size)])


def within(group: Group, body: Callable[[Any], Any]) -> Any:
    with group:
        return body(group)


def results(kind: str, world_size: int, body: Callable[[Any], Any], **options: Any) -> list[Any]:
    """``outcomes`` where none may be an exception."""
    found = outcomes(kind, world_size, body, **options)
    errors = [outcome for outcome in found if isinstance(outcome, Exception)]
    for error in sorted(errors, key=lambda error: isinstance(error, TransportError)):  # first causes first
        raise error
    return found
