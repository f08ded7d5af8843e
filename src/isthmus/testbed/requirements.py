"""What a testbed needs of the host: everything that is missing is told at once, with how to get it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import TestbedSpec
from isthmus.testbed.cgroups import Controller, ControllerName, host_controllers
from isthmus.testbed.shell import call, fails

_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sh": "dash",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "taskset": "util-linux",
    "mount": "mount",
    "umount": "mount",
}
_CONTROLLER_HELP = {
    "cpu": "with version 2 it must be in cgroup.controllers of the root; boot without cgroup_disable=cpu, or, in a "
    "container, have it handed down",
    "memory": "boot the kernel with cgroup_enable=memory, or leave --memory out",
}


def controllers_for(spec: TestbedSpec) -> list[ControllerName]:
    """The control group controllers that limit these devices."""
    return ["cpu", "memory"] if any(device.memory_bytes is not None for device in spec.devices) else ["cpu"]


def check_root(what: str) -> None:
    """Raises ``IsthmusError`` unless this process is root."""
    if os.geteuid() != 0:
        raise IsthmusError(f"testbed: {what} needs root; run it with sudo")


def check_host(spec: TestbedSpec) -> dict[ControllerName, Controller]:
    """Where the controllers' groups are to be made. Tries the kernel's features out in a namespace of their own.

    Raises ``IsthmusError`` that lists all that is missing and how to get it.
    """
    wanted = controllers_for(spec)
    controllers = host_controllers(wanted)
    missing = [
        f"{tool} is not installed (apt-get install {package})"
        for tool, package in _TOOLS.items()
        if shutil.which(tool) is None
    ]
    missing += [
        f"no control group hierarchy has the {name} controller ({_CONTROLLER_HELP[name]})"
        for name in wanted
        if name not in controllers
    ]
    if os.geteuid() != 0:
        missing.insert(0, "root (run with sudo)")
    elif not missing:
        missing += _closed_groups(controllers)
        missing += _missing_features(spec)
    if missing:
        raise IsthmusError(f"testbed: this host lacks what a testbed needs: {'; '.join(missing)}")
    return controllers


def _closed_groups(controllers: dict[ControllerName, Controller]) -> Iterator[str]:
    for parent in sorted({controller.parent for controller in controllers.values()}):
        if not os.access(parent, os.W_OK):
            yield f"{parent} cannot be written to (mount it writable; a container needs --privileged)"


def _missing_features(spec: TestbedSpec) -> Iterator[str]:
    namespace = f"isthmus.{spec.name}.probe{os.getpid()}"
    if words := fails("ip", "netns", "add", namespace):
        yield f"network namespaces: {words} (a container needs --privileged)"
        return
    with _deleted_after(namespace):
        link = ["ip", "-n", namespace, "link", "add", "name"]
        if words := fails(*link, "probe0", "type", "bridge"):
            yield f"bridges: {words} (modprobe bridge)"
        if words := fails(*link, "probe1", "type", "veth", "peer", "name", "probe2"):
            yield f"veth links: {words} (modprobe veth)"
        limit = ["tc", "-n", namespace, "qdisc", "replace", "dev", "lo", "root"]
        if words := fails(*limit, "tbf", "rate", "1mbit", "burst", "64kb", "latency", "400ms"):
            yield f"limits on bandwidth: {words} (modprobe sch_tbf)"
        is_delayed = any(device.delay_s for device in spec.devices)
        if is_delayed and (words := fails(*limit, "netem", "delay", "1ms")):
            yield (
                f"delays: the kernel has no netem ({words}); leave --delay out, or try modprobe sch_netem, or a "
                "kernel with CONFIG_NET_SCH_NETEM (Debian's own have it, on Ubuntu apt-get install linux-modules-extra)"
            )


@contextmanager
def _deleted_after(namespace: str) -> Iterator[None]:
    try:
        yield
    finally:
        call("ip", "netns", "delete", namespace)
