"""Meeting under torchrun, whose agent listens at MASTER_PORT itself: rank 0 takes a free port and tells it through the
agent's store."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from isthmus.transport.errors import RendezvousError
from isthmus.transport.rendezvous import listen

_numbers = count()
"""Groups that this process has made: a port is told once for each."""


def is_port_held_by_agent() -> bool:
    """Whether this process was started by torchrun, and MASTER_PORT is its agent's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def agreed_port(environment: dict[str, Any], timeout_s: float) -> Iterator[tuple[int, socket.socket | None]]:
    """The port that all ranks meet at, and rank 0's listener there (None on the others). ``environment`` as
    ``read_environment`` gives it. Blocks on rank 0; raises ``RendezvousError`` when it does not come."""
    address, rank = environment["address"], environment["rank"]
    key = f"isthmus/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_numbers)}"
    try:
        store = TCPStore(address, environment["port"], is_master=False, timeout=timedelta(seconds=timeout_s))
        if rank == 0:
            with listen(address) as listener:
                port = listener.getsockname()[1]
                store.set(key, str(port))
                yield port, listener
        else:
            yield int(store.get(key)), None
    except DistError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RendezvousError(f"rank 0 has told no port through torchrun's agent at {address} ({reason})") from error
