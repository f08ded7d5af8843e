"""What is seen of the other end of a connection, and ports to meet at."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from isthmus.transport.rendezvous import has_left, held_port, listen

IP_LOCAL_PORT_RANGE = 51
"""Linux 6.3: the ports that a socket may be given: the lowest and the highest, two bytes each."""


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


@pytest.mark.parametrize("is_for_a_listener", [True, False])
def test_a_held_port_is_given_to_nobody_and_can_be_listened_on(is_for_a_listener: bool) -> None:
    with held_port() as port, listen("127.0.0.1") as other, socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_for_a_listener)
        try:
            asking.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", port, port))
        except OSError:
            pytest.skip("this kernel cannot limit a socket to one port")
        with pytest.raises(OSError) as refused:
            if is_for_a_listener:
                asking.bind(("127.0.0.1", 0))
            else:
                asking.connect(other.getsockname())
        assert refused.value.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
        for _ in range(2):
            with listen("127.0.0.1", port) as listener, socket.create_connection(listener.getsockname()[:2]):
                pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
