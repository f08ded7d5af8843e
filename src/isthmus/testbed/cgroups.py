"""Control groups, version 1 and 2: which hierarchy has which controller, a device's groups, its limits and processes.

A device has one group per hierarchy that limits it, of the same name in each. Groups are made beneath the group that
the caller is in (version 2: the nearest one above it that hands the controllers down), so that whatever limits the
caller limits the devices too. A run has a group of its own inside the device's, by which its processes are found
whatever they do.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.spec.errors import IsthmusError
from isthmus.testbed.layout import is_our_group

ControllerName = Literal["cpu", "memory"]
_POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Where one controller's groups are made."""

    version: int
    parent: str
    """Directory in which devices' groups are made."""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One mounted hierarchy: ``controllers`` is empty in version 2, whose groups name theirs themselves."""

    version: int
    root: str
    """The group that is seen at ``point``: ``/``, or the container's own."""
    point: Path
    controllers: frozenset[str]

    def group_of(self, own_groups: str) -> Path:
        """The caller's group, by the text of ``/proc/self/cgroup``."""
        for line in own_groups.splitlines():
            number, controllers, group = line.split(":", 2)
            is_this = number == "0" if self.version == 2 else bool(self.controllers & set(controllers.split(",")))
            if is_this:
                inside = os.path.relpath(group, self.root)
                # A group above what is mounted here cannot be named by a path.
                return self.point if inside.startswith("..") else self.point / inside
        return self.point


def read_mounts(mountinfo: str) -> list[Mount]:
    """The hierarchies in the text of ``/proc/self/mountinfo``."""
    mounts = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        _, _, _, root, point, *_ = before.split(" ")
        if kind == "cgroup2":
            mounts.append(Mount(version=2, root=root, point=Path(point), controllers=frozenset()))
        elif kind == "cgroup":
            controllers = frozenset(options.split(","))
            mounts.append(Mount(version=1, root=root, point=Path(point), controllers=controllers))
    return mounts


def find_controllers(
    wanted: Iterable[ControllerName], mounts: list[Mount], own_groups: str
) -> dict[ControllerName, Controller]:
    """Where the ``wanted`` controllers' groups can be made; one that no hierarchy has is left out."""
    found: dict[ControllerName, Controller] = {}
    unified: list[ControllerName] = []
    for name in wanted:
        old = [mount for mount in mounts if mount.version == 1 and name in mount.controllers]
        if old:
            found[name] = Controller(version=1, parent=str(old[0].group_of(own_groups)))
        else:
            unified.append(name)
    for mount in mounts:
        if mount.version == 2:
            unified = [name for name in unified if name in _words(mount.point / "cgroup.controllers")]
            parent = _nearest_that_hands_down(set(unified), mount, own_groups)
            found |= {name: Controller(version=2, parent=str(parent)) for name in unified}
            break
    return found


def _nearest_that_hands_down(names: set[ControllerName], mount: Mount, own_groups: str) -> Path:
    own = mount.group_of(own_groups)
    for group in (own, *own.parents):
        if group == mount.point:
            break
        # A group that holds processes itself hands nothing down, which is so of the caller's own, but at the root.
        if names <= _words(group / "cgroup.subtree_control"):
            return group
    return mount.point


def _words(path: Path) -> set[str]:
    return set(path.read_text().split()) if path.exists() else set()


def host_controllers(wanted: Iterable[ControllerName]) -> dict[ControllerName, Controller]:
    """``find_controllers`` on this host, for this process."""
    mounts = read_mounts(Path("/proc/self/mountinfo").read_text())
    return find_controllers(wanted, mounts, Path("/proc/self/cgroup").read_text())


def make_group(controllers: dict[ControllerName, Controller], group: str) -> None:
    """Makes the group in every hierarchy, without limits. Raises ``IsthmusError`` when a controller cannot be had."""
    for name, controller in controllers.items():
        parent = Path(controller.parent)
        if controller.version == 2 and name not in _words(parent / "cgroup.subtree_control"):
            _write(parent / "cgroup.subtree_control", f"+{name}")
        (parent / group).mkdir(exist_ok=True)


def limit_cpu(controller: Controller, group: str, quota_us: int, period_us: int) -> None:
    """Lets the group compute for ``quota_us`` in every ``period_us``; takes effect at once."""
    path = Path(controller.parent, group)
    if controller.version == 2:
        _write(path / "cpu.max", f"{quota_us} {period_us}")
        return
    # Each write is checked against the groups above by itself, so there must be no quota while the period changes.
    _write(path / "cpu.cfs_quota_us", "-1")
    _write(path / "cpu.cfs_period_us", str(period_us))
    _write(path / "cpu.cfs_quota_us", str(quota_us))


def limit_memory(controller: Controller, group: str, memory_bytes: int) -> None:
    """Limits what the group's processes use from when they enter it, swap included where the kernel counts swap."""
    path = Path(controller.parent, group)
    if controller.version == 2:
        _write(path / "memory.max", str(memory_bytes))
        swap, value = path / "memory.swap.max", "0"
    else:
        _write(path / "memory.limit_in_bytes", str(memory_bytes))
        swap, value = path / "memory.memsw.limit_in_bytes", str(memory_bytes)
    if swap.exists():
        _write(swap, value)


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        raise IsthmusError(
            f"{path}: could not write {value!r} ({error.strerror}): is a group above it limited to less, or, with "
            "version 2, are there processes in the group itself?"
        ) from error


def processes_in(group: Path) -> list[int]:
    """Process ids in the group and in those beneath it; none when it is gone."""
    pids = []
    for folder in (group, *_groups_beneath(group)):
        try:
            # A process of another pid namespace reads 0, which must never be signalled: 0 is the caller's own group.
            pids += [int(line) for line in (folder / "cgroup.procs").read_text().split() if line != "0"]
        except OSError:
            continue
    return pids


def signal_processes(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends the signal to each process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def is_empty_within(groups: list[Path], timeout_s: float) -> bool:
    """Waits until no process is in the groups; False when there still are some after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while any(processes_in(group) for group in groups):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def remove_group(group: Path, timeout_s: float = 10.0) -> None:
    """Kills what is in the group and removes it and those beneath it. Does nothing when it is gone.

    Raises ``IsthmusError`` when processes are still there after ``timeout_s`` (stuck in the kernel).
    """
    deadline = time.monotonic() + timeout_s
    while group.is_dir():
        # Again and again, since what is killed may just have forked.
        signal_processes(processes_in(group), signal.SIGKILL)
        for folder in (*_groups_beneath(group), group):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if time.monotonic() >= deadline:
                    pids = ", ".join(map(str, processes_in(group))) or "none that can be seen"
                    raise IsthmusError(
                        f"{group}: could not be removed ({error.strerror}); processes: {pids}"
                    ) from error
                time.sleep(_POLL_S)
                break


def groups_of(name: str, mounts: list[Mount]) -> list[Path]:
    """Every group of the testbed ``name`` in any hierarchy, whoever made it."""
    folders = (folder for mount in mounts for folder in _groups_beneath(mount.point))
    return sorted(folder for folder in folders if is_our_group(folder.name, name))


def groups_on_host(name: str) -> list[Path]:
    """``groups_of`` on this host."""
    return groups_of(name, read_mounts(Path("/proc/self/mountinfo").read_text()))


def _groups_beneath(group: Path) -> Iterator[Path]:
    """Deepest first, as they are to be removed."""
    for folder, _, _ in os.walk(group, topdown=False):
        if Path(folder) != group:
            yield Path(folder)
