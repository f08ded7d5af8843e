"""isthmus.testbed.layout: names fit and are told apart, addresses never collide."""

from __future__ import annotations

import ipaddress
import json

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.testbed.asking import MAX_DEVICES
from isthmus.testbed.layout import Layout, choose_subnet, is_our_group, is_our_link
from isthmus.testbed.network import networks_in

LAYOUT = Layout(name="tenletters", subnet=ipaddress.IPv4Network("10.213.4.0/24"))


def test_link_names_fit_the_kernel_and_addresses_the_subnet() -> None:
    names = [LAYOUT.bridge, *(LAYOUT.host_link(device) for device in range(MAX_DEVICES))]
    assert max(map(len, names)) <= 15
    addresses = [LAYOUT.host_address, *(LAYOUT.address(device) for device in range(MAX_DEVICES))]
    assert len(set(addresses)) == len(addresses)
    assert all(ipaddress.IPv4Address(address) in list(LAYOUT.subnet.hosts()) for address in addresses)
    assert LAYOUT.interface(3) == "10.213.4.13/24"


def test_mac_addresses_are_local_and_differ() -> None:
    macs = [LAYOUT.bridge_mac]
    macs += [mac for device in range(MAX_DEVICES) for mac in (LAYOUT.host_mac(device), LAYOUT.device_mac(device))]
    assert len(set(macs)) == len(macs)
    # Locally administered, and no group address.
    assert {int(mac[:2], 16) & 3 for mac in macs} == {2}


def test_what_is_ours_is_told_by_name_and_mark() -> None:
    assert is_our_link(LAYOUT.bridge, LAYOUT.bridge_mac, "tenletters")
    assert is_our_link(LAYOUT.host_link(12), LAYOUT.host_mac(12), "tenletters")
    assert is_our_group(LAYOUT.namespace(12), "tenletters")
    assert is_our_group(LAYOUT.group(0), "tenletters")
    assert is_our_group("isthmus.tenletters.probe17", "tenletters")


def test_what_others_made_is_not_ours() -> None:
    assert not is_our_link(LAYOUT.bridge, "02:42:11:22:33:44", "tenletters")
    assert not is_our_link("tenletters", LAYOUT.bridge_mac, "tenletters")
    assert not is_our_link("other-br", LAYOUT.bridge_mac, "tenletters")
    assert not is_our_group("tenletters.0", "tenletters")
    assert not is_our_group("isthmus.tenletters2.0", "tenletters")
    assert not is_our_group("isthmus.tenletters.0.bak", "tenletters")


def networks(*texts: str) -> list[ipaddress.IPv4Network]:
    return [ipaddress.IPv4Network(text) for text in texts]


def test_first_free_subnet_is_chosen() -> None:
    assert str(choose_subnet(None, [])) == "10.213.0.0/24"
    taken = networks("0.0.0.0/0", "10.213.0.0/24", "10.213.1.7/32", "192.168.0.0/16")
    assert str(choose_subnet(None, taken)) == "10.213.2.0/24"


def test_subnet_that_is_taken_or_not_private_is_refused() -> None:
    assert str(choose_subnet("192.168.7.0/24", networks("192.168.6.0/24"))) == "192.168.7.0/24"
    for wanted, taken, message in (
        ("192.168.7.0/24", ["192.168.0.0/16"], r"subnet: 192.168.7.0/24 overlaps 192.168.0.0/16"),
        (None, ["10.0.0.0/8"], r"subnet: all of 10.213.0.0/16 is taken"),
        ("8.8.8.0/24", [], r"subnet: got '8.8.8.0/24', wanted a private /24"),
        ("10.0.0.0/16", [], r"subnet: got '10.0.0.0/16', wanted a private /24"),
        ("10.0.0.1/24", [], r"subnet: got '10.0.0.1/24' \(.*host bits"),
    ):
        with pytest.raises(IsthmusError, match=message):
            choose_subnet(wanted, networks(*taken))


def test_networks_are_read_from_routes() -> None:
    routes = json.dumps([{"dst": "default"}, {"dst": "192.0.2.0/24"}, {"type": "local", "dst": "127.0.0.1"}])
    assert networks_in(routes) == networks("0.0.0.0/0", "192.0.2.0/24", "127.0.0.1/32")
    assert networks_in("") == []
