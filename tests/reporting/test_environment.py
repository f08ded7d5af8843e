from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from isthmus.reporting.environment import _git_commit, environment, memory_bytes, num_cpus_usable


def limits(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_environment_is_plain_json_with_what_a_reader_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["variables"] == {"OMP_NUM_THREADS": "3"} | {
        name: value for name, value in os.environ.items() if name in ("MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    assert isinstance(facts["versions"], dict) and set(facts["versions"]) >= {"isthmus", "torch", "transformers"}
    assert isinstance(facts["memory_bytes"], int) and facts["memory_bytes"] > 0
    assert facts["cpu_name"] and facts["platform"] and facts["date"]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_usable_cpus_respect_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], wanted: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert num_cpus_usable(limits(tmp_path, files)) == wanted


def test_usable_cpus_respect_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    assert num_cpus_usable(limits(tmp_path, {"cpu.max": "400000 100000"})) == 1


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_respects_the_limit(tmp_path: Path, name: str) -> None:
    assert memory_bytes(limits(tmp_path, {name: "1048576\n"})) == 1 << 20
    limits(tmp_path, {name: "max\n"})
    assert memory_bytes(tmp_path) > 1 << 20


def test_commit_is_that_of_the_folder_and_says_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever repository runs the tests (a commit hook sets these) must not be taken for the one under test.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert _git_commit(package) is None
    (package / "a.py").write_text("1")
    git("init", "-q")
    git("add", "package")
    git("commit", "-q", "--no-verify", "-m", "first")
    assert _git_commit(package) == git("rev-parse", "HEAD")
    (package / "a.py").write_text("2")
    assert _git_commit(package) == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "b.py").write_text("3")
    assert _git_commit(tmp_path / "venv") is None
