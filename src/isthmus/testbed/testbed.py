"""``Testbed``: sets a testbed up, changes its limits, runs commands on its devices and removes it without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceMeasurement, DeviceSpec, TestbedReport, TestbedSpec
from isthmus.testbed import cgroups, network
from isthmus.testbed.asking import check_device, check_name, check_spec
from isthmus.testbed.cores import cores_for, keep_on, usable_cores
from isthmus.testbed.environment import device_environment
from isthmus.testbed.layout import Layout, choose_subnet
from isthmus.testbed.limits import cpu_quota_us
from isthmus.testbed.measure import measure
from isthmus.testbed.processes import Outcome, Output, Place, StopSignals, Supervisor
from isthmus.testbed.requirements import check_host, check_root
from isthmus.testbed.state import (
    TestbedState,
    forget_state,
    load_state,
    only_one_changes,
    save_state,
    standing,
    state_file,
)

DEFAULT_GRACE_S = 10.0
DEFAULT_MASTER_PORT = 29500


def _tell_nobody(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """Whether a device is still what was set up, and how many processes run in it."""

    has_namespace: bool
    has_link: bool
    has_groups: bool
    num_processes: int

    @property
    def is_alive(self) -> bool:
        return self.has_namespace and self.has_link and self.has_groups


class Testbed:
    """A standing testbed. It outlives the process; as a context it is removed at the end."""

    __test__ = False  # not a test, whatever pytest reads from the name

    def __init__(self, state: TestbedState) -> None:
        """For ``up`` and ``load``, which know that it stands."""
        self._state = state

    @classmethod
    def up(cls, spec: TestbedSpec, *, replace: bool = False) -> Testbed:
        """Sets up what ``spec`` asks for, within a second; unmeasured. With ``replace`` in place of what has its name.

        Raises ``IsthmusError`` when the host lacks something, a value of ``spec`` is not possible, or a testbed or
        something else of that name is there. What had been set up until then is removed again, on any error.
        """
        check_spec(spec, os.cpu_count() or 1)
        controllers = check_host(spec)
        with only_one_changes():
            if _leftovers(spec.name):
                if not replace:
                    raise IsthmusError(
                        f"name: a testbed {spec.name!r} is up, or left from a crash; remove it first with "
                        f"`isthmus testbed down --name {spec.name}`, or say --replace, or choose another --name"
                    )
                _remove(spec.name)
            subnet = choose_subnet(spec.subnet, network.taken_networks())
            layout = Layout(name=spec.name, subnet=subnet)
            if foreign := network.foreign_links(layout, len(spec.devices)):
                raise IsthmusError(f"name: {', '.join(foreign)} is there and not isthmus's; choose another --name")
            cores = _room_for(spec)
            state = TestbedState(spec=spec, subnet=str(subnet), controllers=controllers, cores=cores)
            try:
                network.make_bridge(layout)
                for number, device in enumerate(spec.devices):
                    network.make_device(layout, number, device)
                    cgroups.make_group(controllers, layout.group(number))
                    _limit_group(state, number)
                save_state(state)
            except BaseException:
                _remove(spec.name)
                raise
        return cls(state)

    @classmethod
    def load(cls, name: str = "isthmus") -> Testbed:
        """The testbed that is up under ``name``. Raises ``IsthmusError`` when none is."""
        check_name(name)
        return cls(load_state(name))

    @property
    def state(self) -> TestbedState:
        """How it is set up and limited now."""
        return self._state

    @property
    def report(self) -> TestbedReport:
        """What was asked, and what was measured of it if anything was."""
        return TestbedReport(asked=self._state.spec, measured=self._state.measured)

    def __enter__(self) -> Testbed:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def down(self) -> None:
        """Ends every process on the devices and removes all that ``up`` made."""
        remove_testbed(self._state.spec.name)

    def measure(self, tell: Callable[[str], None] = _tell_nobody) -> tuple[DeviceMeasurement, ...]:
        """Measures every device while the others are idle, about 3 s for each, and keeps it in the state.

        ``tell`` is told what is measured next. Nothing should run on the devices meanwhile.
        """
        check_root("measuring")
        with self._places(range(len(self._state.spec.devices))) as places:
            measured = measure(self._state, places, tell)
        with self._changing() as state:
            self._save(dataclasses.replace(state, measured=measured))
        return measured

    def set_bandwidth(self, mbit_per_s: float, devices: Sequence[int] | None = None) -> None:
        """Limits the links of ``devices`` (None: all) anew, both ways, at once; also while something runs on them."""
        self._set_limit(devices, bandwidth_bits_per_s=mbit_per_s * 1e6)

    def set_cpu(self, cpu_share: float, devices: Sequence[int] | None = None) -> None:
        """Gives ``devices`` (None: all) so many cores, at once; also while something runs on them."""
        self._set_limit(devices, cpu_share=cpu_share)

    def run(
        self,
        argv: Sequence[str],
        *,
        devices: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        quiet_others: bool = False,
        timeout_s: float | None = None,
        grace_s: float = DEFAULT_GRACE_S,
        master_port: int = DEFAULT_MASTER_PORT,
    ) -> Outcome:
        """Runs ``argv`` once per device of ``devices`` (None: all), at the same time, and waits until all have ended.

        Ranks are given in the order of ``devices``. ``env`` comes on top of this process's environment. The first
        device's output passes through, the others' comes with their number before each line, or with ``quiet_others``
        only what they write to stderr; with ``output``, a directory, all goes to ``device-N.out`` and ``.err`` there.
        When a process fails, the others have ``grace_s`` seconds to end, then get SIGTERM and as long again later
        SIGKILL; after ``timeout_s``, and when this process is told to end, SIGTERM comes at once. What the commands
        left running on the devices is ended too.

        Raises ``IsthmusError`` when the testbed or the command is not there, and ``Interrupted``, a
        ``KeyboardInterrupt``, when this process got a signal (noticed in the main thread only).
        """
        check_root("running on devices")
        numbers = self._numbers(devices)
        environments = [
            device_environment(self._state, numbers, rank, {**os.environ, **(env or {})}, master_port)
            for rank in range(len(numbers))
        ]
        if not argv or shutil.which(argv[0], path=environments[0].get("PATH")) is None:
            raise IsthmusError(f"command: got {' '.join(argv)!r}, wanted a program that is there and may be run")
        with StopSignals() as stop, self._places(numbers) as places, contextlib.ExitStack() as files:
            with Supervisor(grace_s, timeout_s) as supervisor:
                for rank, place in enumerate(places):
                    stdout, stderr = _outputs(place.device, rank, output, quiet_others, files)
                    supervisor.start(place, argv, environments[rank], stdout, stderr)
                return supervisor.wait(stop)

    def status(self) -> tuple[DeviceStatus, ...]:
        """What of each device is there. Needs no root."""
        layout = self._state.layout
        namespaces, links = network.namespaces_of(layout.name), network.links_of(layout.name)
        statuses = []
        for number in range(len(self._state.spec.devices)):
            statuses.append(
                DeviceStatus(
                    has_namespace=layout.namespace(number) in namespaces,
                    has_link=layout.host_link(number) in links,
                    has_groups=all(group.is_dir() for group in _groups(self._state, number)),
                    num_processes=len(_processes(self._state, number)),
                )
            )
        return tuple(statuses)

    @contextlib.contextmanager
    def _places(self, numbers: Sequence[int]) -> Iterator[list[Place]]:
        """Places with groups of their own for one run, which are removed with all that runs in them."""
        statuses = self.status()
        if broken := [number for number in numbers if not statuses[number].is_alive]:
            raise IsthmusError(
                f"device {', '.join(map(str, broken))}: part of it is gone, see `isthmus testbed status`; set it up "
                "again with `isthmus testbed up --replace`"
            )
        layout, controllers = self._state.layout, self._state.controllers
        run = f"run-{os.getpid()}-{secrets.token_hex(3)}"
        places = []
        for number in numbers:
            run_group = Path(controllers["cpu"].parent, layout.group(number), run)
            groups = [run_group]
            if "memory" in controllers and controllers["memory"].parent != controllers["cpu"].parent:
                groups.append(Path(controllers["memory"].parent, layout.group(number)))
            place = Place(
                device=number,
                namespace=layout.namespace(number),
                groups=tuple(groups),
                run_group=run_group,
                cores=_cores_of(self._state, number),
            )
            places.append(place)
        with contextlib.ExitStack() as last_to_first:
            for place in places:
                place.run_group.mkdir()
                last_to_first.callback(cgroups.remove_group, place.run_group)
            yield places

    def _numbers(self, devices: Sequence[int] | None) -> tuple[int, ...]:
        num_devices = len(self._state.spec.devices)
        numbers = tuple(range(num_devices)) if devices is None else tuple(devices)
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(num_devices)):
            raise IsthmusError(f"device: got {list(numbers)}, wanted different ones of 0 to {num_devices - 1}")
        return numbers

    def _set_limit(self, devices: Sequence[int] | None, **changes: float) -> None:
        check_root("limiting devices")
        with self._changing() as state:
            numbers = self._numbers(devices)
            specs: list[DeviceSpec] = list(state.spec.devices)
            for number in numbers:
                specs[number] = dataclasses.replace(specs[number], **changes)
                check_device(state.spec, specs[number], os.cpu_count() or 1, f"device {number}")
            # What was measured before no longer holds.
            spec = dataclasses.replace(state.spec, devices=tuple(specs))
            cores = _room_for(spec) if "cpu_share" in changes else state.cores
            self._save(dataclasses.replace(state, spec=spec, cores=cores, measured=()))
            for number in numbers:
                if "cpu_share" in changes:
                    _limit_group(self._state, number)
                else:
                    network.limit_link(self._state.layout, number, specs[number])
            if cores != state.cores:
                for number in range(len(specs)):
                    keep_on(_processes(self._state, number), _cores_of(self._state, number))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[TestbedState]:
        """The state as it is now, which another process may have changed or removed, and nobody else changing it."""
        with only_one_changes():
            yield load_state(self._state.spec.name)

    def _save(self, state: TestbedState) -> None:
        save_state(state)
        self._state = state


def remove_testbed(name: str) -> bool:
    """Ends and removes all that carries the testbed's name, known from a state file or not. False: there was nothing.

    Goes on past what cannot be removed, and then raises ``IsthmusError`` that names it.
    """
    check_name(name)
    check_root("removing a testbed")
    with only_one_changes():
        was_there = bool(_leftovers(name))
        _remove(name)
    return was_there


def _leftovers(name: str) -> list[str]:
    groups = [str(group) for group in cgroups.groups_on_host(name)]
    files = [str(path) for path in (state_file(name),) if path.exists()]
    return groups + network.namespaces_of(name) + network.links_of(name) + files


def _remove(name: str) -> None:
    # Processes first, so that none of them sees its network vanish and prints about it.
    removals: list[tuple[Callable[..., None], object]] = [
        *((cgroups.remove_group, group) for group in cgroups.groups_on_host(name)),
        *((network.remove_link, link) for link in network.links_of(name)),
        *((network.remove_namespace, namespace) for namespace in network.namespaces_of(name)),
        (forget_state, name),
    ]
    errors = []
    for remove, what in removals:
        try:
            remove(what)
        except (IsthmusError, OSError) as error:
            errors.append(str(error))
    if errors:
        raise IsthmusError(f"name: not all of testbed {name!r} could be removed: {'; '.join(errors)}")


def _room_for(spec: TestbedSpec) -> tuple[int, ...]:
    """What the devices of ``spec`` find room on, beside those of other testbeds."""
    taken = dict.fromkeys(usable_cores(), 0.0)
    for other in standing(but=spec.name):
        for device, core in zip(other.spec.devices, other.cores, strict=False):
            if core in taken:
                taken[core] += device.cpu_share
    return cores_for(spec.devices, taken)


def _cores_of(state: TestbedState, number: int) -> tuple[int, ...]:
    return (state.cores[number],) if state.cores else tuple(usable_cores())


def _groups(state: TestbedState, number: int) -> set[Path]:
    return {Path(controller.parent, state.layout.group(number)) for controller in state.controllers.values()}


def _processes(state: TestbedState, number: int) -> set[int]:
    return {pid for group in _groups(state, number) for pid in cgroups.processes_in(group)}


def _limit_group(state: TestbedState, number: int) -> None:
    device, group = state.spec.devices[number], state.layout.group(number)
    cgroups.limit_cpu(state.controllers["cpu"], group, *cpu_quota_us(device.cpu_share, state.spec.cpu_quota_s))
    if device.memory_bytes is not None:
        cgroups.limit_memory(state.controllers["memory"], group, device.memory_bytes)


def _outputs(
    device: int, rank: int, output: Path | None, quiet_others: bool, files: contextlib.ExitStack
) -> tuple[Output, Output]:
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        stdout = files.enter_context((output / f"device-{device}.out").open("wb"))
        stderr = files.enter_context((output / f"device-{device}.err").open("wb"))
        return stdout.fileno(), stderr.fileno()
    if rank == 0:
        return None, None
    return subprocess.DEVNULL if quiet_others else subprocess.PIPE, subprocess.PIPE
