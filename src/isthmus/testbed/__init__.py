"""N weak devices with slow links, emulated on one Linux host: ``Testbed`` and what it is asked for."""

from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.testbed import Testbed

__all__ = ["DeviceSpec", "Testbed", "TestbedSpec"]
