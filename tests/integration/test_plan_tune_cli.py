"""What ``isthmus plan tune`` says of this machine is what ``isthmus tune`` then takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.support import EMULATED, Inputs, Tune, report, succeed

from isthmus.spec.plan_tune import PlanTuneReport
from isthmus.spec.serialization import from_json

SIZE = ("--seq-len", "32", "--micro-batches", "2", "--dtype", "fp32")


@pytest.mark.parametrize("memory", ["1500kB", "16MiB"])
@pytest.mark.parametrize("in_flight", [(), ("--micro-batches-in-flight", "1")])
def test_memory_as_planned_is_what_a_run_takes(
    memory: str, in_flight: tuple[str, ...], inputs: Inputs, run: Tune, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    emulated = (*EMULATED, "--accelerator-memory", memory, *in_flight)
    succeed(run(["plan", "tune", str(inputs.model), *SIZE, *emulated, "--no-changes", "--report", str(path)]))
    planned = from_json(PlanTuneReport, path.read_text())
    succeed(run(inputs.arguments(tmp_path / "out", *emulated, "--steps", "2")))
    taken = report(tmp_path / "out")["summary"]
    assert planned.fits
    assert planned.micro_batches_in_flight == taken["micro_batches_in_flight"]
    peak_bytes = planned.devices[0].total_bytes
    assert taken["peak_accelerator_bytes"] <= peak_bytes <= 1.05 * taken["peak_accelerator_bytes"]
    kinds = dict(planned.hosts[0].kinds_bytes)
    del kinds["staging"]
    assert sum(kinds.values()) == taken["needed_host_bytes"]
