"""Processes of several hosts meet over an interface that the others reach, or are told why they cannot."""

from __future__ import annotations

import os
from collections import namedtuple

import psutil
import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.pipeline import interface

CHOICE = "GLOO_SOCKET_IFNAME"
Entry = namedtuple("Entry", "address")
INTERFACES = {"lo": [Entry("127.0.0.1"), Entry("::1")], "eth0": [Entry("10.0.0.5"), Entry("fe80::5%eth0")]}


@pytest.fixture(autouse=True)
def _second_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: INTERFACES)
    monkeypatch.setenv(CHOICE, "to be put back")
    monkeypatch.delenv(CHOICE)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)


def reach(monkeypatch: pytest.MonkeyPatch, master: str, own: str | OSError) -> None:
    """MASTER_ADDR is ``master``, which sees this host as ``own``."""

    def address_towards(host: str, port: int) -> str:
        assert (host, port) == (master, 29500)
        if isinstance(own, OSError):
            raise own
        return own

    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setattr(interface, "address_towards", address_towards)


@pytest.mark.parametrize("own", ["10.0.0.5", "fe80::5%eth0"])
def test_the_interface_is_the_one_that_leads_to_the_first_host(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, "first", own)
    interface.choose_interface()
    assert os.environ[CHOICE] == "eth0"


def test_an_interface_that_the_user_has_named_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, "first", "10.0.0.5")
    monkeypatch.setenv(CHOICE, "ib0")
    interface.choose_interface()
    assert os.environ[CHOICE] == "ib0"


def test_an_address_of_no_interface_leaves_the_choice_to_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, "first", "10.0.0.77")
    interface.choose_interface()
    assert CHOICE not in os.environ


@pytest.mark.parametrize("own", ["127.0.1.1", "::1"])
def test_a_loopback_is_refused_where_there_are_other_hosts(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, "first", own)
    with pytest.raises(IsthmusError, match=r"MASTER_ADDR: rank 2 got first, here a loopback address, .*--master-addr"):
        interface.choose_interface()


@pytest.mark.parametrize("on_this_host", ["4", None])
def test_on_one_host_the_loopback_will_do(on_this_host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, "localhost", "127.0.0.1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    if on_this_host is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_host)
    interface.choose_interface()
    assert CHOICE not in os.environ


def test_a_first_host_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, "frist", OSError("Name or service not known"))
    with pytest.raises(
        IsthmusError, match=r"rank 2 got frist, to which no way leads \(Name or service not known\); give"
    ):
        interface.choose_interface()
