"""``isthmus demo`` on several devices as a user types it: what it shows and writes, and that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.inference.conftest import checkpoint  # noqa: F401
from tests.inference.test_block_parallel import saved  # noqa: F401
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.inference.demo import LocalProcesses
from isthmus.spec.errors import IsthmusError
from isthmus.spec.report import BenchInferReport
from isthmus.spec.serialization import from_json
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.cgroups import groups_on_host
from isthmus.testbed.network import namespaces_of
from isthmus.testbed.requirements import check_host
from isthmus.testbed.testbed import remove_testbed

pytestmark = pytest.mark.xdist_group("demo")  # all raise the testbed of that name
END_TIMEOUT_S = 150
"""Far more than it takes: where nothing is in the page cache, importing PyTorch alone takes a minute."""
ISTHMUS = str(Path(sys.executable).parent / "isthmus")


def test_tests_that_raise_this_testbed_share_a_worker(request: pytest.FixtureRequest) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") is None:
        pytest.skip("there is one worker")
    assert request.node.nodeid.endswith("@demo")


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:  # noqa: F811
    return checkpoint("bert")


@pytest.fixture
def decoupled(model: Path, saved: Callable[[str, str], Path], tmp_path: Path) -> Path:  # noqa: F811
    """An output with what the decouple part leaves there, in small."""
    shutil.copytree(model, tmp_path / "decouple" / "trained" / "original")
    shutil.copytree(saved("bert", "four"), tmp_path / "decouple" / "decoupled")
    return tmp_path


def demo(model: Path, output: Path, *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return part_of_demo("infer", output, "--model", str(model), *options)


@contextlib.contextmanager
def part_of_demo(part: str, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``isthmus demo --only PART``, which ends with the block, and what it started too."""
    command = [ISTHMUS, "demo", "--only", part, "--output", str(output), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()
            if "--processes" not in options and not os.getuid():
                remove_testbed("demo")  # there is none, unless the demo hung


def needs_testbed() -> None:
    if namespaces_of("demo") or groups_on_host("demo"):
        pytest.skip("a testbed named demo is up")
    try:
        check_host(TestbedSpec(devices=(DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=1e9),)))
    except IsthmusError as error:
        pytest.skip(str(error))


def check_output(text: str, folder: Path, names: list[str]) -> None:
    assert "→ what the planner takes" in text and "from those of transformers" in text
    assert (folder / "latency.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        rows = from_json(BenchInferReport, (folder / name / "report.json").read_text()).rows
        kinds = {(row.strategy, row.codec, row.num_devices) for row in rows}
        assert kinds >= {(strategy, codec, 4) for strategy in ("tensor", "sequence") for codec in ("fp32", "int8")}
        assert ("single", "fp32", 1) in kinds and sum(row.is_choice for row in rows) == 1


def test_plain_processes_show_every_way_and_say_that_nothing_is_limited(model: Path, tmp_path: Path) -> None:
    with demo(model, tmp_path, "--processes") as process:
        text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert "plain processes of this machine, neither they nor their links limited: asked for" in text
    assert "Mbit/s" not in text
    check_output(text, tmp_path / "infer", ["unlimited"])


@pytest.mark.long
def test_testbed_shows_two_bandwidths_and_is_gone_afterwards(model: Path, tmp_path: Path) -> None:
    needs_testbed()
    with demo(model, tmp_path) as process:
        text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    check_output(text, tmp_path / "infer", ["250-mbit", "50-mbit"])
    assert namespaces_of("demo") == [] and groups_on_host("demo") == []


def check_latency(text: str, folder: Path, names: list[str]) -> None:
    assert "→ what the planner takes for each of the two models" in text
    assert "bert (" in text and "and its copy in 4 sub-blocks: 128 tokens, 4 devices" in text
    assert (folder / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.parent.name for path in folder.glob("*/report.json")) == sorted(names)
    for name in names:
        rows = from_json(BenchInferReport, (folder / name / "report.json").read_text()).rows
        kinds = {(row.strategy, row.codec, row.num_devices, row.num_sub_blocks) for row in rows}
        assert kinds >= {(strategy, "fp32", 4, 1) for strategy in ("tensor", "sequence")} | {("block", "fp32", 4, 4)}
        assert kinds >= {("single", "fp32", 1, 1), ("single", "fp32", 1, 4)}
        assert {row.strategy for row in rows} == {"single", "tensor", "sequence", "block"}


def test_a_model_and_its_decoupled_copy_are_compared_on_plain_processes(decoupled: Path) -> None:
    with part_of_demo("latency", decoupled, "--processes") as process:
        text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert "neither they nor their links limited: asked for" in text
    check_latency(text, decoupled / "latency", ["unlimited"])


@pytest.mark.long
def test_a_model_and_its_decoupled_copy_are_compared_at_several_bandwidths(decoupled: Path) -> None:
    needs_testbed()
    with part_of_demo("latency", decoupled) as process:
        text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    check_latency(text, decoupled / "latency", ["1000-mbit", "250-mbit", "50-mbit"])
    assert namespaces_of("demo") == [] and groups_on_host("demo") == []


@pytest.mark.parametrize("missing", ["trained/original", "decoupled"])
def test_latency_without_what_decouple_leaves_says_what_to_run(missing: str, decoupled: Path) -> None:
    (decoupled / "decouple" / missing / "config.json").unlink()
    result = CliRunner().invoke(app, ["demo", "--only", "latency", "--output", str(decoupled)])
    assert result.exit_code == 2
    said = "".join(result.stderr.split())
    assert f"demo:thereisnomodelin{decoupled}/decouple/{missing};runthisfirst:" in said
    assert said.endswith(f"isthmusdemo--onlydecouple--output{decoupled}")
    assert not (decoupled / "latency").exists()


@pytest.mark.parametrize("options", [("--processes",), ()], ids=["processes", "testbed"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_devices_too(
    options: tuple[str, ...], number: signal.Signals, model: Path, tmp_path: Path
) -> None:
    if not options:
        needs_testbed()
    with demo(model, tmp_path, *options) as process:
        wait_until_measuring(process)
        children = children_of(process, at_least=4)
        process.send_signal(number)
        process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 128 + number
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert options or (namespaces_of("demo") == [] and groups_on_host("demo") == [])


@pytest.mark.parametrize("options", [("--processes",), ()], ids=["processes", "testbed"])
def test_a_device_that_dies_ends_the_demo_which_says_where_to_look(
    options: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    if not options:
        needs_testbed()
    with demo(model, tmp_path, *options) as process:
        wait_until_measuring(process)
        device = device_of(process, rank=3)
        children = children_of(process, at_least=4)
        device.kill()
        text, _ = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 2
    assert f"device 3 ended with exit code 137; look at what the devices said in {tmp_path}" in unwrapped(text)
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert options or (namespaces_of("demo") == [] and groups_on_host("demo") == [])


def wait_until_measuring(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "measuring them" in line:
            return
    raise AssertionError("".join(said))


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def children_of(process: subprocess.Popen[str], at_least: int) -> list[psutil.Process]:
    ends_at = time.monotonic() + END_TIMEOUT_S
    while len(children := psutil.Process(process.pid).children(recursive=True)) < at_least:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends_at, children
        time.sleep(0.05)
    return children


def device_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The device itself, once it is there: not what enters its namespace, nor what it starts for a moment, such as a
    compiler."""
    ends_at = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < ends_at:
        for child in psutil.Process(process.pid).children(recursive=True):  # parents come first
            with contextlib.suppress(psutil.Error):
                if "python" in Path(child.exe()).name and child.environ().get("RANK") == str(rank):
                    return child
        time.sleep(0.05)
    raise AssertionError(f"no device of rank {rank} after {END_TIMEOUT_S} s")


def test_a_device_that_fails_ends_the_others_and_gives_its_exit_code(tmp_path: Path) -> None:
    before = psutil.Process().children()
    script = "import os, sys, time; print(os.environ['RANK'], flush=True); os.environ['RANK'] == '1' and sys.exit(7)"
    outcome = LocalProcesses(2).run([sys.executable, "-c", f"{script}; time.sleep(600)"], output=tmp_path)
    assert outcome.exit_code == 7
    assert (tmp_path / "device-1.out").read_text() == "1\n"
    assert psutil.Process().children() == before


def test_devices_that_take_too_long_are_ended() -> None:
    before = psutil.Process().children()
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert LocalProcesses(2).run(sleeping, timeout_s=0.2).exit_code == 124
    assert psutil.Process().children() == before
