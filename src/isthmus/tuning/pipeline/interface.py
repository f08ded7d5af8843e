"""Over which network interface the processes of several hosts meet."""

from __future__ import annotations

import os
from ipaddress import ip_address

import psutil

from isthmus.spec.errors import IsthmusError
from isthmus.transport.rendezvous import address_towards

_CHOICE = "GLOO_SOCKET_IFNAME"
_FIX = (
    "give torchrun an address of the first host that all hosts reach (--master-addr 192.168.1.10), or with "
    "--rdzv-backend c10d each host's own address (--local-addr)."
)


def choose_interface() -> None:
    """Has gloo use the interface from which MASTER_ADDR is reached (on its own host: which has that address). Left to
    itself it takes the one that the host's name stands for, which often is the loopback. Sets ``GLOO_SOCKET_IFNAME``
    unless the user has.

    Raises ``IsthmusError`` where MASTER_ADDR cannot be reached, or only from this host though there are others.
    """
    if _CHOICE in os.environ or "MASTER_ADDR" not in os.environ:
        return
    rank, master = os.environ.get("RANK", "?"), os.environ["MASTER_ADDR"]
    try:
        own = address_towards(master, int(os.environ.get("MASTER_PORT", "0")) or 1)
    except OSError as error:
        raise IsthmusError(f"MASTER_ADDR: rank {rank} got {master}, to which no way leads ({error}); {_FIX}") from error
    if not ip_address(own.partition("%")[0]).is_loopback:
        if (name := _interface_of(own)) is not None:
            os.environ[_CHOICE] = name
    elif _is_on_several_hosts():
        raise IsthmusError(
            f"MASTER_ADDR: rank {rank} got {master}, here a loopback address, which no other host reaches; {_FIX}"
        )


def _is_on_several_hosts() -> bool:
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) < int(num_ranks)


def _interface_of(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if address in [entry.address for entry in entries]), None)
