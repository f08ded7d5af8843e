"""What is seen of the other end of a connection."""

from __future__ import annotations

import socket

import pytest

from isthmus.transport.rendezvous import has_left, listen


@pytest.mark.parametrize("is_unread", [False, True])
def test_who_has_ended_has_left_also_if_something_was_unread(is_unread: bool) -> None:
    """Then the connection is reset."""
    with listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname()[:2]) as here:
        there, _ = listener.accept()
        assert not has_left(here)
        if is_unread:
            here.sendall(b"unread")
            there.recv(1)
        there.close()
        assert has_left(here)
