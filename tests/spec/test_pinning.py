"""Processes are moved to their cores whole."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from isthmus.spec.pinning import pin


def test_threads_that_were_there_before_are_pinned_too() -> None:
    """As gloo's are, which send and receive."""
    cores, over = os.sched_getaffinity(0), threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert thread.native_id is not None
    own = [max(cores)]
    try:
        pin(own)
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == set(own)
    finally:
        pin(sorted(cores))
        over.set()
        thread.join()


def test_another_process_is_moved_and_one_that_has_ended_is_not() -> None:
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            pin([core], process.pid)
            assert os.sched_getaffinity(process.pid) == {core}
        finally:
            process.kill()
    with pytest.raises(OSError, match=str(process.pid)):
        pin([core], process.pid)
