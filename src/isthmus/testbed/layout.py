"""What a testbed consists of, by name and address: links, namespaces, control groups, the subnet. Pure.

Everything that isthmus makes can be told from what others made without any record of it: namespaces and control groups
begin with ``isthmus.NAME.``, links are named after the testbed and have a MAC address that begins with 02:69:73:74
("ist", locally administered), given to them in the moment in which they are made.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from isthmus.spec.errors import IsthmusError

_OUR_MAC = "02:69:73:74"
_POOL = ipaddress.IPv4Network("10.213.0.0/16")
_PREFIX_LENGTH = 24
DEVICE_LINK = "eth0"
"""The link's name inside every device."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and addresses of the testbed ``name`` in ``subnet``, by device number."""

    name: str
    subnet: ipaddress.IPv4Network

    @property
    def bridge(self) -> str:
        return f"{self.name}-br"

    @property
    def bridge_mac(self) -> str:
        return f"{_OUR_MAC}:00:00"

    @property
    def host_address(self) -> str:
        """The bridge's own, by which the host reaches the devices."""
        return str(self.subnet[1])

    def host_link(self, device: int) -> str:
        """The end of the device's link that is a port of the bridge."""
        return f"{self.name}-{device}"

    def host_mac(self, device: int) -> str:
        return f"{_OUR_MAC}:01:{device:02x}"

    def device_mac(self, device: int) -> str:
        return f"{_OUR_MAC}:02:{device:02x}"

    def namespace(self, device: int) -> str:
        return f"isthmus.{self.name}.{device}"

    def group(self, device: int) -> str:
        """Name of the device's control group, in every hierarchy."""
        return f"isthmus.{self.name}.{device}"

    def address(self, device: int) -> str:
        return str(self.subnet[10 + device])

    def interface(self, device: int) -> str:
        """The device's address with the length of its subnet, as ``ip`` takes it."""
        return f"{self.address(device)}/{self.subnet.prefixlen}"

    @property
    def host_interface(self) -> str:
        return f"{self.host_address}/{self.subnet.prefixlen}"


def is_our_link(link: str, mac: str, name: str) -> bool:
    """Whether a link of the host, by its name and MAC address, is of the testbed ``name``."""
    return bool(re.fullmatch(rf"{name}-(br|\d+)", link)) and mac.startswith(_OUR_MAC + ":")


def is_our_group(group: str, name: str) -> bool:
    """Whether a namespace or a control group is of the testbed ``name``."""
    return bool(re.fullmatch(rf"isthmus\.{name}\.(probe)?\d+", group))


def choose_subnet(wanted: str | None, taken: Iterable[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """``wanted``, or else the first /24 of 10.213.0.0/16, that overlaps none of ``taken`` (the host's networks).

    Raises ``IsthmusError`` when ``wanted`` is no private /24 or is taken, or all are.
    """
    # The default route is everywhere and means nothing.
    others = [network for network in taken if network.prefixlen]
    if wanted is None:
        for subnet in _POOL.subnets(new_prefix=_PREFIX_LENGTH):
            if not any(subnet.overlaps(other) for other in others):
                return subnet
        raise IsthmusError(f"subnet: all of {_POOL} is taken on this host; name a free one, such as 192.168.77.0/24")
    try:
        subnet = ipaddress.IPv4Network(wanted)
    except ValueError as error:
        raise IsthmusError(f"subnet: got {wanted!r} ({error}), wanted a private one such as 10.213.4.0/24") from error
    if subnet.prefixlen != _PREFIX_LENGTH or not subnet.is_private:
        raise IsthmusError(f"subnet: got {wanted!r}, wanted a private /{_PREFIX_LENGTH} such as 10.213.4.0/24")
    if clash := [str(other) for other in others if subnet.overlaps(other)]:
        raise IsthmusError(
            f"subnet: {subnet} overlaps {', '.join(clash)} on this host; leave --subnet out or name another"
        )
    return subnet
