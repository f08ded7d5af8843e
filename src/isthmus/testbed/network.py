"""Makes, limits and removes a testbed's bridge, links and network namespaces, by ``ip`` and ``tc``; needs root."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import signal
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec
from isthmus.testbed.cgroups import signal_processes
from isthmus.testbed.layout import DEVICE_LINK, Layout, is_our_group, is_our_link
from isthmus.testbed.limits import device_end_commands, host_end_commands
from isthmus.testbed.shell import call, call_all

_NAMESPACES = Path("/run/netns")
_LINKS = Path("/sys/class/net")


def make_bridge(layout: Layout) -> None:
    """The switch, with an address by which the host reaches the devices. Nothing is forwarded to anywhere else."""
    # The MAC address comes with the name, in one request: it is what tells the bridge as ours after a crash.
    call("ip", "link", "add", "name", layout.bridge, "address", layout.bridge_mac, "type", "bridge")
    call("ip", "address", "add", layout.host_interface, "dev", layout.bridge)
    call("ip", "link", "set", "dev", layout.bridge, "up")


def make_device(layout: Layout, device: int, spec: DeviceSpec) -> None:
    """A namespace with a limited link to the bridge."""
    namespace, link = layout.namespace(device), layout.host_link(device)
    call("ip", "netns", "add", namespace)
    ends = ["name", link, "address", layout.host_mac(device), "type", "veth", "peer", "name", DEVICE_LINK]
    call("ip", "link", "add", *ends, "address", layout.device_mac(device), "netns", namespace)
    limit_link(layout, device, spec)
    call("ip", "link", "set", "dev", link, "master", layout.bridge, "up")
    call("ip", "-n", namespace, "address", "add", layout.interface(device), "dev", DEVICE_LINK)
    call("ip", "-n", namespace, "link", "set", "dev", DEVICE_LINK, "up")
    call("ip", "-n", namespace, "link", "set", "dev", "lo", "up")


def limit_link(layout: Layout, device: int, spec: DeviceSpec) -> None:
    """Limits both ends of the device's link, in place of the limits that were there."""
    call_all([["tc", *arguments] for arguments in host_end_commands(layout.host_link(device), spec)])
    inside = ["tc", "-n", layout.namespace(device)]
    call_all([[*inside, *arguments] for arguments in device_end_commands(DEVICE_LINK, spec)])


def links_of(name: str) -> list[str]:
    """The host's links that are the testbed's."""
    return sorted(link for link, mac in _links() if is_our_link(link, mac, name))


def foreign_links(layout: Layout, num_devices: int) -> list[str]:
    """Links that have the names that the testbed needs, but are somebody else's."""
    wanted = {layout.bridge, *(layout.host_link(device) for device in range(num_devices))}
    return sorted(link for link, mac in _links() if link in wanted and not is_our_link(link, mac, layout.name))


def _links() -> list[tuple[str, str]]:
    links = []
    for folder in _LINKS.iterdir():
        try:
            links.append((folder.name, (folder / "address").read_text().strip()))
        except OSError:  # it went in between, or is no link (bonding_masters)
            continue
    return links


def namespaces_of(name: str) -> list[str]:
    """The testbed's network namespaces."""
    if not _NAMESPACES.is_dir():
        return []
    return sorted(entry.name for entry in _NAMESPACES.iterdir() if is_our_group(entry.name, name))


def taken_networks() -> list[ipaddress.IPv4Network]:
    """IPv4 networks that the host has routes to, other testbeds' among them."""
    return networks_in(call("ip", "-4", "-json", "route", "show", "table", "all"))


def networks_in(routes: str) -> list[ipaddress.IPv4Network]:
    """Destinations in the JSON of ``ip route show``."""
    destinations = [route["dst"] for route in json.loads(routes or "[]")]
    return [ipaddress.IPv4Network("0.0.0.0/0" if dst == "default" else dst, strict=False) for dst in destinations]


def remove_link(link: str) -> None:
    """Removes the link and its other end; not an error when it has just gone."""
    if (_LINKS / link).exists():
        call("ip", "link", "delete", "dev", link)


def remove_namespace(namespace: str) -> None:
    """Kills what runs in the namespace and removes it."""
    with contextlib.suppress(IsthmusError):  # a crash while it was made leaves a name without a namespace
        signal_processes(map(int, call("ip", "netns", "pids", namespace).split()), signal.SIGKILL)
    call("ip", "netns", "delete", namespace)
