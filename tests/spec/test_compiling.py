"""Kernels are compiled once a machine, and where they cannot be, it is said what is missing and PyTorch goes on."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import isthmus
from isthmus.spec import compiling
from isthmus.spec.errors import IsthmusError

_SOURCE = Path(isthmus.__file__).parent
DECODE, SUMS = _SOURCE / "inference" / "decode.c", _SOURCE / "transport" / "sums.c"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)


def compiler(tmp_path: Path, script: str) -> str:
    path = tmp_path / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_library_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    # What is compiled does not matter here, so this needs no compiler.
    monkeypatch.setenv(
        "CC", compiler(tmp_path, f'echo called >> {log}; while [ "$1" != -o ]; do shift; done; echo > "$2"')
    )
    first = compiling.build(DECODE)
    assert first.is_file() and compiling.build(DECODE) == first
    assert compiling.build(SUMS) != first
    assert log.read_text().split() == ["called", "called"]


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(IsthmusError, match=r"no C compiler was found .* apt install gcc"):
        compiling.build(DECODE)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(IsthmusError, match=r"no no-such-compiler \(named by CC\) was found"):
        compiling.build(DECODE)


def test_a_compiler_that_does_not_know_an_option_is_asked_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = 'case "$*" in *=native*) exit 1;; esac; while [ "$1" != -o ]; do shift; done; echo > "$2"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert compiling.build(SUMS).is_file()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, "echo math.h: No such file >&2; exit 1"))
    with pytest.raises(IsthmusError, match=r"could not compile .*decode.c \(math.h: No such file\): .* libc6-dev"):
        compiling.build(DECODE)


def test_loading_says_once_that_pytorch_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiling.load.cache_clear()
    try:
        assert compiling.load(DECODE) is None and compiling.load(DECODE) is None
        assert capsys.readouterr().err.count("no C compiler") == 1
        compiling.load.cache_clear()
        monkeypatch.setenv("ISTHMUS_NATIVE", "0")
        assert compiling.load(DECODE) is None
        assert capsys.readouterr().err == ""
    finally:
        compiling.load.cache_clear()
