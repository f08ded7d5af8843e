"""isthmus.testbed.cgroups on a tree of files that stands in for the kernel's, in version 1, version 2 and both."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.testbed.cgroups import (
    Controller,
    ControllerName,
    find_controllers,
    groups_of,
    limit_cpu,
    limit_memory,
    make_group,
    processes_in,
    read_mounts,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)
    return folder


def mountinfo(root: Path, *lines: str) -> str:
    other = "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    return other + "".join(
        f"3{number} 25 0:3{number} {line}\n".replace("ROOT", str(root)) for number, line in enumerate(lines)
    )


def version_2(root: Path, inside: str = "/") -> str:
    return mountinfo(root, f"{inside} ROOT rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate")


def controllers_in(mounts: str, own: str) -> dict[ControllerName, Controller]:
    return find_controllers(("cpu", "memory"), read_mounts(mounts), own)


def test_version_1_groups_are_made_beneath_the_caller_s(root: Path) -> None:
    mounts = mountinfo(
        root,
        "/ ROOT/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        "/ ROOT/memory rw - cgroup cgroup rw,memory",
        "/ ROOT/systemd rw - cgroup cgroup rw,xattr,name=systemd",
    )
    own = "4:memory:/user.slice/a\n2:cpu,cpuacct:/\n1:name=systemd:/user.slice/b\n0::/\n"
    assert controllers_in(mounts, own) == {
        "cpu": Controller(version=1, parent=f"{root}/cpu,cpuacct"),
        "memory": Controller(version=1, parent=f"{root}/memory/user.slice/a"),
    }


def test_container_s_mount_hides_the_groups_above_it(root: Path) -> None:
    mounts = mountinfo(root, "/docker/abc ROOT/cpu rw - cgroup cgroup rw,cpu")
    assert controllers_in(mounts, "2:cpu:/docker/abc/inner\n")["cpu"].parent == f"{root}/cpu/inner"
    assert controllers_in(mounts, "2:cpu:/elsewhere\n")["cpu"].parent == f"{root}/cpu"


def test_version_2_groups_are_made_in_the_nearest_that_hands_both_down(root: Path) -> None:
    write(root, cgroup_dot_controllers="cpuset cpu memory pids", cgroup_dot_subtree_control="cpu memory")
    write(root / "user.slice", cgroup_dot_subtree_control="cpu memory pids")
    write(root / "user.slice" / "user-0.slice", cgroup_dot_subtree_control="memory pids")
    write(root / "user.slice" / "user-0.slice" / "session-1.scope", cgroup_dot_subtree_control="")
    own = "0::/user.slice/user-0.slice/session-1.scope\n"
    parent = Controller(version=2, parent=f"{root}/user.slice")
    assert controllers_in(version_2(root), own) == {"cpu": parent, "memory": parent}


def test_version_2_falls_back_to_the_root(root: Path) -> None:
    write(root, cgroup_dot_controllers="cpu memory", cgroup_dot_subtree_control="")
    write(root / "a", cgroup_dot_subtree_control="")
    assert controllers_in(version_2(root), "0::/a\n")["cpu"] == Controller(version=2, parent=str(root))


def test_controllers_may_be_split_between_the_versions(root: Path) -> None:
    write(root, cgroup_dot_controllers="memory", cgroup_dot_subtree_control="memory")
    mounts = version_2(root) + mountinfo(root, "/ ROOT/../cpu rw - cgroup cgroup rw,cpu")
    found = controllers_in(mounts, "2:cpu:/\n0::/\n")
    assert {name: controller.version for name, controller in found.items()} == {"cpu": 1, "memory": 2}


def test_controller_that_nobody_has_is_left_out(root: Path) -> None:
    write(root, cgroup_dot_controllers="hugetlb")
    assert controllers_in(version_2(root), "0::/\n") == {}
    assert controllers_in("", "") == {}


def test_version_2_group_is_made_and_limited(root: Path) -> None:
    write(root, cgroup_dot_subtree_control="")
    controller = Controller(version=2, parent=str(root))
    make_group({"cpu": controller}, "isthmus.a.0")
    assert (root / "cgroup.subtree_control").read_text() == "+cpu"
    group = write(root / "isthmus.a.0", memory_dot_swap_dot_max="max")
    limit_cpu(controller, "isthmus.a.0", 1000, 2222)
    limit_memory(controller, "isthmus.a.0", 2**30)
    assert (group / "cpu.max").read_text() == "1000 2222"
    assert (group / "memory.max").read_text() == str(2**30)
    assert (group / "memory.swap.max").read_text() == "0"


def test_controller_that_is_handed_down_already_is_left_alone(root: Path) -> None:
    write(root, cgroup_dot_subtree_control="cpu memory")
    make_group({"cpu": Controller(version=2, parent=str(root))}, "isthmus.a.0")
    assert (root / "cgroup.subtree_control").read_text() == "cpu memory"


def test_version_1_quota_changes_while_there_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = write(root / "isthmus.a.0")
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.append((path.name, text)))
    limit_cpu(Controller(version=1, parent=str(root)), group.name, 1000, 2222)
    assert written == [("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", "2222"), ("cpu.cfs_quota_us", "1000")]


@pytest.mark.parametrize("counts_swap", [True, False])
def test_version_1_memory_is_limited_with_swap_where_it_is_counted(root: Path, counts_swap: bool) -> None:
    group = write(root / "isthmus.a.0", **({"memory_dot_memsw_dot_limit_in_bytes": "-1"} if counts_swap else {}))
    limit_memory(Controller(version=1, parent=str(root)), group.name, 4096)
    assert (group / "memory.limit_in_bytes").read_text() == "4096"
    swap = group / "memory.memsw.limit_in_bytes"
    assert swap.read_text() == "4096" if counts_swap else not swap.exists()


def test_limit_that_cannot_be_written_is_told_with_its_place(root: Path) -> None:
    with pytest.raises(IsthmusError, match=r"isthmus.a.0/cpu.max: could not write '1000 2222' \(No such file"):
        limit_cpu(Controller(version=2, parent=str(root)), "isthmus.a.0", 1000, 2222)


def test_processes_are_those_of_the_group_and_beneath_it(root: Path) -> None:
    write(root / "a", cgroup_dot_procs="12\n13\n")
    # 0 is a process of another pid namespace; kill(0) would hit the caller's own process group.
    write(root / "a" / "run", cgroup_dot_procs="0\n14\n")
    write(root / "b", cgroup_dot_procs="15\n")
    assert sorted(processes_in(root / "a")) == [12, 13, 14]
    assert processes_in(root / "gone") == []


def test_groups_of_a_testbed_are_found_wherever_they_are(root: Path) -> None:
    for name in ("user.slice/isthmus.a.0", "isthmus.a.1", "isthmus.b.0", "user.slice/other"):
        write(root / name)
    assert sorted(group.name for group in groups_of("a", read_mounts(version_2(root)))) == [
        "isthmus.a.0",
        "isthmus.a.1",
    ]
