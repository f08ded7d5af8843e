"""isthmus.spec.units: what people write is read as meant, and anything else is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.spec.errors import IsthmusError
from isthmus.spec.units import parse_bits_per_s, parse_bytes, parse_emulate, parse_rate, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * 1024**3),
        ("8 gib", 8 * 1024**3),
        ("1.5KiB", 1536),
        ("512MiB", 512 * 1024**2),
        ("2TiB", 2 * 1024**4),
        ("2GB", 2 * 1000**3),
        ("100", 100),
        ("100B", 100),
        (4096, 4096),
    ],
)
def test_sizes_are_read_as_meant(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@given(st.integers(min_value=1, max_value=2**20), st.sampled_from(["KiB", "MB", "GiB"]))
def test_size_is_count_times_unit(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * parse_bytes(f"1{unit}")


@pytest.mark.parametrize("text", ["", "GiB", "8Gi", "8 potatoes", "-8GiB", "8GiB/s", "nan", "1,5GiB", "0", "0GiB", -1])
def test_bad_size_is_refused_with_the_field_and_an_example(text: str | int) -> None:
    with pytest.raises(IsthmusError, match=r"accelerator-memory: got .*8GiB"):
        parse_bytes(text, "accelerator-memory")


@pytest.mark.parametrize(
    ("text", "rate"), [("2GB/s", 2e9), ("1GiB/s", 1024**3), ("5e9", 5e9), (2.5e9, 2.5e9), (10, 10)]
)
def test_rates_are_read_as_meant(text: str | float, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["2GB", "2Gb/h", "fast", "0GB/s", -1.0, float("inf"), float("nan")])
def test_bad_rate_is_refused_with_the_field_and_an_example(text: str | float) -> None:
    with pytest.raises(IsthmusError, match=r"h2d: got .*2GB/s"):
        parse_rate(text, "h2d")


@pytest.mark.parametrize(
    ("text", "rate"), [("125mbit", 125e6), ("1 Gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3), ("300bit", 300)]
)
def test_bandwidths_are_read_as_meant(text: str, rate: float) -> None:
    assert parse_bits_per_s(text) == rate


@pytest.mark.parametrize("text", ["125", "125MB/s", "fast", "0mbit", "-1mbit", "nan", "mbit", "1e999mbit"])
def test_bad_bandwidth_is_refused_with_the_field_and_an_example(text: str) -> None:
    with pytest.raises(IsthmusError, match=r"device 0: bandwidth: got .*125mbit"):
        parse_bits_per_s(text, "device 0: bandwidth")


def test_seconds_are_read_as_meant() -> None:
    assert [parse_seconds(text) for text in ("20us", "1.5ms", "2s", "3ns", "0")] == pytest.approx(
        [2e-5, 1.5e-3, 2, 3e-9, 0]
    )


def test_emulation_is_read_as_meant() -> None:
    assert parse_emulate("h2d=2GB/s, d2h=1GB/s,latency=20us,threads=1") == {
        "h2d_bytes_per_s": 2e9,
        "d2h_bytes_per_s": 1e9,
        "latency_s": pytest.approx(2e-5),
        "num_threads": 1,
    }
    assert parse_emulate("threads=2,") == {"num_threads": 2}
    assert parse_emulate("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2d", r"emulate: got 'h2d', wanted h2d=RATE"),
        ("pcie=2GB/s", r"emulate: got 'pcie=2GB/s', wanted h2d=RATE"),
        ("h2d=2GB/s,h2d=1GB/s", r"emulate: h2d is there twice"),
        ("h2d=2GB", r"emulate h2d: got '2GB', wanted a rate"),
        ("latency=20", r"emulate latency: got '20', wanted a duration"),
        ("threads=1.5", r"emulate threads: got '1.5', wanted a whole number"),
        ("threads=0", r"emulate threads: got '0', wanted a whole number"),
    ],
)
def test_bad_emulation_is_refused_by_part(text: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        parse_emulate(text)
