"""Small testbeds for tests that need root, ``ip`` and ``tc``: two devices under a name of their own, always removed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.requirements import check_host
from isthmus.testbed.testbed import Testbed, remove_testbed


@pytest.fixture
def spec() -> Iterator[TestbedSpec]:
    """What to set up. Skips where no testbed can be, with the reason."""
    device = DeviceSpec(cpu_share=0.5, bandwidth_bits_per_s=50e6, memory_bytes=256 * 2**20)
    spec = TestbedSpec(name=f"t{secrets.token_hex(4)}", devices=(device, device))
    try:
        check_host(spec)
    except IsthmusError as error:
        pytest.skip(str(error))
    yield spec
    remove_testbed(spec.name)


@pytest.fixture
def testbed(spec: TestbedSpec) -> Testbed:
    return Testbed.up(spec)
