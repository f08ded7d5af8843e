"""Groups over sockets: what the conformance suite, which asks every implementation, does not."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from tests.transport.groups import outcomes

from isthmus.transport import sockets
from isthmus.transport.errors import PeerLostError
from isthmus.transport.sockets import SocketGroup

FOREVER_S = 1000.0
"""Longer than a test may take: nothing waits for this limit."""


@pytest.mark.parametrize("has_word", [False, True])
@pytest.mark.parametrize("lost", [1, 2])
def test_one_that_is_lost_while_a_subgroup_is_made_is_not_waited_for(
    lost: int, has_word: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has said where it listens, and its connections end, with or without a goodbye."""
    groups: dict[int, SocketGroup] = {}
    connect_all = sockets.connect_all

    def connect(rank: int, addresses: Any, *arguments: Any) -> Any:
        if len(addresses) == 3 and rank == lost:
            for connection in () if has_word else groups[rank]._connections.values():
                connection.shutdown(socket.SHUT_RDWR)
            raise OSError("no power")
        return connect_all(rank, addresses, *arguments)

    def make(group: SocketGroup) -> None:
        groups[group.rank] = group
        if group.rank < 3:
            group.subgroup([0, 1, 2]).all_reduce(torch.zeros(1))

    monkeypatch.setattr(sockets, "connect_all", connect)
    found = outcomes("sockets", 4, make, timeout_s=FOREVER_S)
    assert isinstance(found.pop(lost), OSError)
    first, second, other = found
    assert isinstance(first, PeerLostError) and isinstance(second, PeerLostError) and other is None
