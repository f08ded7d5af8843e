from __future__ import annotations

import pytest

from isthmus.reporting.human import human_bytes, human_memory, human_s


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (999_700, "1.00 MB"), (12_340_000, "12.3 MB"), (2.5e12, "2.50 TB")],
)
def test_bytes_have_three_digits(num_bytes: float, text: str) -> None:
    assert human_bytes(num_bytes) == text


def test_memory_counts_in_powers_of_1024() -> None:
    assert [human_memory(n) for n in (0, 1 << 10, 3 << 19, 8 << 30)] == ["0 B", "1.00 KiB", "1.50 MiB", "8.00 GiB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (85e-6, "85 µs"),
        (0.0124, "12.4 ms"),
        (0.9998, "1.00 s"),
        (1.32, "1.32 s"),
        (99.7, "1 min 40 s"),
        (125.2, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3900.0, "1 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert human_s(seconds) == text
