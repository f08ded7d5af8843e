"""A link's rate and burst, from seconds by bytes."""

from __future__ import annotations

import pytest

from isthmus.profiling.network import _rate
from isthmus.spec.cluster import Transfer

SIZES = tuple(1 << power for power in range(14, 23))


def seconds(rate: float, burst: float) -> list[float]:
    return [max(0.0, size - burst) / rate for size in SIZES]


@pytest.mark.parametrize("rate", [3e6, 60e6])
def test_a_token_bucket_is_found(rate: float) -> None:
    bytes_per_s, burst_bytes = _rate(Transfer(num_bytes=SIZES, seconds=tuple(seconds(rate, 65536.0))))
    assert bytes_per_s == pytest.approx(rate)
    assert burst_bytes == pytest.approx(65536.0, rel=1e-6)


def test_one_exchange_that_took_long_is_no_slow_link_with_a_large_burst() -> None:
    found = seconds(60e6, 65536.0)
    found[-1] += 0.2
    bytes_per_s, burst_bytes = _rate(Transfer(num_bytes=SIZES, seconds=tuple(found)))
    assert bytes_per_s == pytest.approx(60e6)
    assert burst_bytes == pytest.approx(65536.0, rel=1e-6)


def test_large_exchanges_that_the_processor_limits_are_no_burst() -> None:
    found = seconds(110e6, 65536.0)
    slow = [max(part, (size - 1.5e5) / 50e6) for size, part in zip(SIZES, found, strict=True)]
    bytes_per_s, burst_bytes = _rate(Transfer(num_bytes=SIZES, seconds=tuple(slow)))
    assert bytes_per_s * 1.001 >= 50e6
    assert 65536.0 <= burst_bytes < 1.5e5


def test_two_sizes_are_enough() -> None:
    assert _rate(Transfer(num_bytes=(1 << 14, 1 << 15), seconds=(0.1, 0.2)))[0] == pytest.approx(163840.0)
