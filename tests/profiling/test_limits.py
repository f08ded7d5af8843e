"""What a control group leaves to a process, in version 1 and 2, of its own group and of those above."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from isthmus.profiling.limits import cpu_quota, free_memory, free_memory_bytes, last_level_cache_bytes

MIB = 1 << 20


def write(path: Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own"
    path.write_text("7:memory:/outer/inner\n3:cpu,cpuacct:/outer/inner\n0::/outer/inner\n")
    return path


def test_memory_of_version_1_is_that_of_the_tightest_group_with_file_pages_free(tmp_path: Path, own: Path) -> None:
    outer, inner = tmp_path / "memory" / "outer", tmp_path / "memory" / "outer" / "inner"
    write(outer, memory__limit_in_bytes=90 * MIB, memory__usage_in_bytes=80 * MIB)
    (outer / "memory.stat").write_text(f"cache 7\ntotal_cache {20 * MIB}\n")
    write(inner, memory__limit_in_bytes=64 * MIB, memory__usage_in_bytes=10 * MIB)
    assert free_memory_bytes(tmp_path, own) == 30 * MIB


def test_memory_of_version_2(tmp_path: Path, own: Path) -> None:
    write(tmp_path / "outer" / "inner", memory__max="max", memory__current=5 * MIB)
    write(tmp_path / "outer", memory__max=64 * MIB, memory__current=10 * MIB)
    (tmp_path / "outer" / "memory.stat").write_text(f"anon 1\nfile {6 * MIB}\n")
    assert free_memory_bytes(tmp_path, own) == 60 * MIB


def test_processes_of_one_group_and_of_the_machine_are_told_apart(tmp_path: Path, own: Path) -> None:
    assert free_memory(tmp_path, own)[1] == ""
    group = tmp_path / "a"
    group.mkdir()
    (group / "memory.max").write_text("1000")
    (group / "memory.current").write_text("400")
    own.write_text("0::/a/b")
    assert free_memory(tmp_path, own) == (600, str(group))


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path, own: Path) -> None:
    assert MIB < free_memory_bytes(tmp_path, own) <= psutil.virtual_memory().total
    assert free_memory_bytes(tmp_path, tmp_path / "none") > MIB


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path, own: Path) -> None:
    write(tmp_path / "outer", memory__max=MIB, memory__current=2 * MIB)
    assert free_memory_bytes(tmp_path, own) == 0


def test_the_tightest_cpu_quota_counts(tmp_path: Path, own: Path) -> None:
    assert cpu_quota(tmp_path, own) is None
    write(tmp_path / "cpu" / "outer", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    assert cpu_quota(tmp_path, own) == (50000, 100000)
    write(tmp_path / "cpu" / "outer" / "inner", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert cpu_quota(tmp_path, own) == (50000, 100000)
    write(tmp_path / "cpu" / "outer" / "inner", cpu__cfs_quota_us=1000, cpu__cfs_period_us=2222)
    assert cpu_quota(tmp_path, own) == (1000, 2222)


def test_the_cpu_quota_of_version_2(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/outer\n")
    write(tmp_path / "outer", cpu__max="450 1000")
    assert cpu_quota(tmp_path, own) == (450, 1000)


def test_caches_that_several_processors_share_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        caches = tmp_path / f"cpu{cpu}" / "cache"
        write(caches / "index0", level=1, size="48K", shared_cpu_list=cpu)
        write(caches / "index3", level=3, size="32768K", shared_cpu_list=shared)
    assert last_level_cache_bytes(tmp_path) == 64 * MIB
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1})
    assert last_level_cache_bytes(tmp_path) == 32 * MIB


def test_a_system_that_does_not_tell_of_caches_has_none(tmp_path: Path) -> None:
    write(tmp_path / "cpu0" / "cache" / "index0", level="", size="")
    assert last_level_cache_bytes(tmp_path) == 0
