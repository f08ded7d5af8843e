"""Commands on the devices of a standing testbed: where they run, what they see, and that none outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import TestbedSpec
from isthmus.testbed.cores import usable_cores
from isthmus.testbed.processes import stop_signals
from isthmus.testbed.testbed import Testbed

IN_A_LOOP = "while :; do sleep 0.05; done"
SHOW_CORES = "grep Cpus_allowed_list /proc/self/status | cut -f2"


def shell(testbed: Testbed, script: str, folder: Path, **options: Any) -> tuple[int, list[str]]:
    """Exit code of ``script`` on the devices, and what each of them wrote, in the order of the devices' numbers."""
    outcome = testbed.run(["sh", "-c", script], output=folder, timeout_s=60, **options)
    assert all(status.num_processes == 0 for status in testbed.status())
    assert not list(Path(testbed.state.controllers["cpu"].parent, testbed.state.layout.group(0)).glob("run-*"))
    return outcome.exit_code, [path.read_text() for path in sorted(folder.glob("*.out"))]


def test_command_sees_the_variables_of_torchrun(testbed: Testbed, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = (
        "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $ISTHMUS_DEVICE "
        "$GLOO_SOCKET_IFNAME $OMP_NUM_THREADS $OWN"
    )
    first, second = (testbed.state.layout.address(device) for device in (0, 1))
    assert shell(testbed, script, tmp_path / "both", env={"OWN": "x", "OMP_NUM_THREADS": "3"}) == (
        0,
        [f"0 2 0 1 {first} 29500 0 eth0 3 x\n", f"1 2 0 1 {first} 29500 1 eth0 3 x\n"],
    )
    # Ranks follow the order in which the devices are named.
    assert shell(testbed, script, tmp_path / "one", devices=[1], master_port=7) == (
        0,
        [f"0 1 0 1 {second} 7 1 eth0 1\n"],
    )


def test_command_runs_inside_its_limits_from_its_start(testbed: Testbed, tmp_path: Path) -> None:
    layout = testbed.state.layout
    _, texts = shell(testbed, "cat /proc/self/cgroup; ls /sys/class/net; ip -o -4 address show eth0", tmp_path)
    for device, text in enumerate(texts):
        groups = [line for line in text.splitlines() if f"/{layout.group(device)}" in line]
        assert len(groups) == len({controller.parent for controller in testbed.state.controllers.values()})
        assert {"lo", "eth0"} <= set(text.splitlines())
        assert f"{layout.address(device)}/24" in text
        assert layout.bridge not in text


def test_command_stays_on_its_devices_core(spec: TestbedSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.testbed.testbed.standing", lambda but: [])  # of other tests at the same time
    testbed = Testbed.up(spec)
    assert testbed.state.cores == tuple((usable_cores() * 2)[:2])
    assert shell(testbed, SHOW_CORES, tmp_path) == (0, [f"{core}\n" for core in testbed.state.cores])


def test_command_moves_with_its_device(spec: TestbedSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.testbed.testbed.standing", lambda but: [])
    testbed = Testbed.up(spec)
    assert len(testbed.state.cores) == 2

    def widen() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        testbed.set_cpu(1.01 if (os.cpu_count() or 1) > 1 else 0.6)  # does not fit on one core each
        (tmp_path / "moved").touch()

    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=widen, daemon=True)
    thread.start()
    wait = "touch started; until [ -e moved ]; do sleep 0.05; done"
    _, [text] = shell(testbed, f"{wait}; {SHOW_CORES}", tmp_path / "out", devices=[0])
    with open("/proc/self/status") as status:
        [own] = [line.split()[1] for line in status if line.startswith("Cpus_allowed_list")]
    assert testbed.state.cores == () and text.strip() == own


def test_command_can_see_its_limits(testbed: Testbed, tmp_path: Path) -> None:
    script = "from isthmus.profiling.limits import *; print(free_memory_bytes() >> 20, *cpu_quota())"
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert testbed.run([sys.executable, "-c", script], output=tmp_path, env=env, timeout_s=60).exit_code == 0
    for device in (0, 1):
        free_mib, quota_us, period_us = map(int, (tmp_path / f"device-{device}.out").read_text().split())
        assert 128 < free_mib < 256 and quota_us / period_us == 0.5


def test_devices_reach_each_other_and_the_host_but_nothing_else(testbed: Testbed, tmp_path: Path) -> None:
    script = """
import os, socket
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    with socket.create_server(address) as server:
        print(server.accept()[0].recv(5).decode())
else:
    while True:
        try:
            with socket.create_connection(address) as connection:
                connection.sendall(b"hello")
            break
        except ConnectionRefusedError:
            pass
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.connect((os.environ["HOST"], 9))
    try:
        probe.connect(("192.0.2.1", 9))
    except OSError as error:
        print(error.strerror)
"""
    env = {"HOST": testbed.state.layout.host_address}
    outcome = testbed.run([sys.executable, "-c", script], output=tmp_path, env=env, timeout_s=60)
    assert outcome.exit_codes == {0: 0, 1: 0}
    assert [(tmp_path / f"device-{device}.out").read_text() for device in (0, 1)] == [
        "hello\n",
        "Network is unreachable\n",
    ]


def test_memory_beyond_the_limit_is_not_to_be_had(testbed: Testbed) -> None:
    greedy = "x = b'1' * (512 * 2**20)"
    assert testbed.run([sys.executable, "-c", greedy], devices=[0]).exit_codes == {0: 128 + signal.SIGKILL}


def test_first_failure_ends_the_others_and_gives_the_exit_code(testbed: Testbed, tmp_path: Path) -> None:
    script = f'[ $RANK = 0 ] || exit 3; trap "echo told; exit 9" TERM; {IN_A_LOOP}'
    outcome = testbed.run(["sh", "-c", script], grace_s=0.2, output=tmp_path)
    assert (outcome.exit_code, outcome.failed_device, outcome.exit_codes) == (3, 1, {0: 9, 1: 3})
    assert (tmp_path / "device-0.out").read_text() == "told\n"


def test_others_may_end_by_themselves_after_a_failure(testbed: Testbed) -> None:
    outcome = testbed.run(["sh", "-c", "[ $RANK = 0 ] || exit 3; sleep 0.3"], grace_s=60)
    assert outcome.exit_codes == {0: 0, 1: 3}


def test_process_that_ignores_sigterm_is_killed(testbed: Testbed, tmp_path: Path) -> None:
    script = f'trap "" TERM; [ $RANK = 0 ] || exit 3; {IN_A_LOOP}'
    assert shell(testbed, script, tmp_path, grace_s=0.2)[0] == 3


def test_timeout_ends_the_run_with_124(testbed: Testbed) -> None:
    outcome = testbed.run(["sleep", "1000"], timeout_s=0.3)
    assert (outcome.exit_code, outcome.has_timed_out, outcome.failed_device) == (124, True, None)


def test_daemon_does_not_outlive_its_run(testbed: Testbed, tmp_path: Path) -> None:
    script = (
        "setsid sh -c 'trap \"\" TERM HUP; echo up > $FILE$RANK; sleep 1000' & while [ ! -e $FILE$RANK ]; do :; done"
    )
    assert shell(testbed, script, tmp_path, env={"FILE": str(tmp_path / "up")}, grace_s=0.2) == (0, ["", ""])


def test_run_in_another_thread_ends_as_well(testbed: Testbed) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(testbed.run(["sh", "-c", "exit $RANK"]).exit_code))
    thread.start()
    thread.join()
    assert codes == [1]


def test_command_that_is_not_there_is_refused(testbed: Testbed) -> None:
    for argv in ([], ["no-such-program", "x"]):
        with pytest.raises(IsthmusError, match=r"command: got .*, wanted a program that is there"):
            testbed.run(argv)


@contextmanager
def command_line(testbed: Testbed, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``isthmus testbed run`` in a process of its own, which is there no longer afterwards."""
    main = "from isthmus.cli.main import app; app()"
    line = [sys.executable, "-c", main, "testbed", "run", "--name", testbed.state.spec.name, *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_others_lines_have_their_number_in_front(testbed: Testbed) -> None:
    with command_line(testbed, "--", "sh", "-c", "printf 'out\\nlast'; echo err >&2; exit $((RANK * 4))") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert sorted(out.replace("last[1]", "last\n[1]").split()) == sorted(["out", "last", "[1]", "out", "[1]", "last"])
    assert sorted(err.splitlines()) == ["[1] err", "device 1 failed first, with exit code 4", "err"]


def test_quiet_others_hides_what_they_write_to_stdout(testbed: Testbed) -> None:
    with command_line(testbed, "--quiet-others", "--", "sh", "-c", "echo out; echo err >&2") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, sorted(err.splitlines())) == (0, "out\n", ["[1] err", "err"])


def test_device_that_never_stops_printing_can_be_ended(testbed: Testbed) -> None:
    with command_line(testbed, "--timeout", "0.3", "--", "sh", "-c", "[ $RANK = 0 ] || yes") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (124, "ended after 0.3 s")
    assert set(out.splitlines()) <= {"[1] y", "[1] "}


def test_hangup_is_no_reason_to_end_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_run_ends_all_of_it(testbed: Testbed, number: signal.Signals) -> None:
    script = f'trap "exit 0" TERM; (setsid sleep 1000 &); echo on; {IN_A_LOOP}'
    with command_line(testbed, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert sorted(process.stdout.readline() for _ in range(2)) == ["[1] on\n", "on\n"]
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == f"ended by {number.name}; nothing of it is left"
    assert all(status.num_processes == 0 for status in testbed.status())


def test_what_a_killed_run_left_is_seen_and_goes_with_the_testbed(testbed: Testbed) -> None:
    with command_line(testbed, "--device", "0", "--", "sh", "-c", "echo $$; exec sleep 1000") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
        assert [status.num_processes for status in testbed.status()] == [1, 0]
        testbed.down()
    # It may still be a zombie, which has no command line, until whoever inherited it asks for its exit code.
    command = Path(f"/proc/{pid}/cmdline")
    assert not command.exists() or command.read_bytes() == b""
