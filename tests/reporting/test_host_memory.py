from __future__ import annotations

import mmap
import threading

import pytest

from isthmus.reporting.host_memory import PeakHostMemory, resident_bytes

HELD_BYTES = 64 << 20


def hold() -> mmap.mmap:
    """Touched memory straight from the system: what malloc was given back it may keep."""
    held = mmap.mmap(-1, HELD_BYTES)
    held.write(b"x" * HELD_BYTES)
    return held


def test_peak_counts_memory_that_is_gone_at_the_end() -> None:
    with PeakHostMemory(interval_s=0.001) as memory:
        before_bytes = memory.peak_bytes
        held = hold()
        sampled = threading.Event()
        while memory.peak_bytes < before_bytes + HELD_BYTES * 0.9:
            sampled.wait(0.001)
        held.close()
    assert memory.peak_bytes >= before_bytes + HELD_BYTES * 0.9


def test_each_block_starts_anew_and_ends_its_thread() -> None:
    memory = PeakHostMemory(interval_s=0.001)
    held = hold()
    with memory:
        pass
    first_bytes = memory.peak_bytes
    held.close()
    with memory:
        pass
    assert memory.peak_bytes < first_bytes
    assert not [thread for thread in threading.enumerate() if thread.name == "isthmus-host-memory"]


def test_resident_bytes_grow_with_what_is_held() -> None:
    before_bytes = resident_bytes()
    held = hold()
    assert resident_bytes() >= before_bytes + HELD_BYTES * 0.9
    held.close()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="interval_s is 0"):
        PeakHostMemory(interval_s=0)
    with PeakHostMemory() as memory, pytest.raises(RuntimeError, match="already sampling"):
        memory.__enter__()
