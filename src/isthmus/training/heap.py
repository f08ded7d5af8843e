"""The C library's heap: whether memory that was freed stays with the process, to be used again without page faults, or
goes back at once, to others who have little of it."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep what is freed, tensors of up to 1 GiB included; for the whole process, from now on.

    A training step frees and allocates the same activations over and over. By default large blocks go back to the
    system each time, and getting them again costs a page fault for every 4 KiB: a sixth of a step on the CPU, measured.
    Threads share one heap from here on, so that what one frees another can use. Returns False, having changed nothing,
    where the C library is another.
    """
    return _set((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_ARENA_MAX, 1))


def return_freed_memory() -> bool:
    """Lets glibc's malloc give back what is free, tensors of 128 KiB and more as soon as they are freed; for the whole
    process, until ``reuse_freed_memory``. Returns False, having changed nothing, where the C library is another.

    By itself it learns to keep blocks as large as have been freed before, up to 32 MiB, and what lies between those
    that are in use is nobody's: a text of 512 tokens that needs 14 MiB at once (BERT-base, one of two devices) takes 34
    to 48 so, and 17 when it is given back. Page faults take time: 30 % more CPU with 128 tokens or 512.
    """
    is_set = _set((_M_MMAP_THRESHOLD, 128 << 10), (_M_TRIM_THRESHOLD, 128 << 10))
    return is_set and _call("malloc_trim", 0) is not None


def reuse_freed_memory() -> bool:
    """What glibc's malloc comes to do by itself: it keeps blocks of up to 32 MiB; for the whole process, until
    ``return_freed_memory``. Returns False, having changed nothing, where the C library is another."""
    return _set((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))


def _set(*settings: tuple[int, int]) -> bool:
    return all([_call("mallopt", name, value) == 1 for name, value in settings])


def _call(name: str, *arguments: int) -> int | None:
    """None where the C library has no such function."""
    try:
        return getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, OSError):
        return None
