"""``isthmus tune`` on two hosts, two processes each: network namespaces on a link of 1 Gbit/s, one torchrun in each."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.integration.support import VOCAB_SIZE, Inputs, Tune, losses, succeed
from transformers import AutoModelForCausalLM

from isthmus.models.tiny import write_tiny_checkpoint
from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.requirements import check_host
from isthmus.testbed.testbed import Testbed

pytestmark = pytest.mark.xdist_group("hosts")

ROOT = Path(__file__).parents[2]
# RANK and MASTER_ADDR are what a testbed sets: which of the hosts this is, and the first one's address.
NAMED_FIRST = '--node-rank "$RANK" --master-addr "$MASTER_ADDR"'
# No name leads to these hosts, so torchrun must be told which of them MASTER_ADDR is.
MEETING = '--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:29400" --rdzv-conf "is_host=$((1 - RANK))"'
OWN_ADDRESS = '--local-addr "$(printenv "HOST_$RANK")"'


@pytest.fixture(scope="module")
def hosts() -> Iterator[Testbed]:
    device = DeviceSpec(cpu_share=1.0, bandwidth_bits_per_s=1e9)
    spec = TestbedSpec(name=f"t{secrets.token_hex(4)}", devices=(device, device))
    try:
        check_host(spec)
    except IsthmusError as error:
        pytest.skip(str(error))
    with Testbed.up(spec) as testbed:
        yield testbed


@pytest.fixture(scope="module")
def deep(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """As ``inputs``, with a model of eight layers."""
    model = tmp_path_factory.mktemp("deep") / "model"
    write_tiny_checkpoint("mixtral", model, 0, "fp32", vocab_size=VOCAB_SIZE, num_hidden_layers=8)
    for file in inputs.model.glob("*token*"):
        shutil.copy(file, model)
    return Inputs(model, inputs.data, inputs.eval_data)


def torchrun(hosts: Testbed, meeting: str, arguments: list[str], folder: Path, *, first: str = "") -> tuple[int, str]:
    """Exit code, and what both hosts said. ``first``: a shell command before it, which sees each host's own mounts."""
    folder.mkdir()
    run = shlex.join([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"])
    command = f"{first} exec {run} {meeting} -m isthmus {shlex.join(arguments)}"
    addresses = {f"HOST_{device}": hosts.state.layout.address(device) for device in range(2)}
    outcome = hosts.run(
        ["env", "-u", "GLOO_SOCKET_IFNAME", "sh", "-c", command],
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **addresses},
        output=folder,
        timeout_s=200.0,
    )
    return outcome.exit_code, "\n".join(file.read_text() for file in sorted(folder.glob("device-*")))


def test_two_hosts_make_the_model_that_one_process_makes(
    deep: Inputs, hosts: Testbed, run: Tune, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    succeed(run(deep.arguments(alone)))

    arguments = deep.arguments(together, "--num-stages", "8", "--save-every", "2")
    code, said = torchrun(hosts, NAMED_FIRST, arguments, tmp_path / "first")
    assert code == 0, said
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    trained = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (alone, together)]
    before = AutoModelForCausalLM.from_pretrained(deep.model).state_dict()
    difference = sum(float((trained[0][name] - trained[1][name]).square().sum()) for name in before)
    update = sum(float((trained[0][name] - before[name]).square().sum()) for name in before)
    assert difference**0.5 <= 1e-3 * update**0.5

    # As if they had been stopped after two steps; the rest by the other way to meet, and encoded.
    shutil.rmtree(together / "checkpoints" / "step-00000004")
    for file in ("report.json", "model.safetensors.index.json"):
        (together / file).unlink()
    code, said = torchrun(
        hosts, f"{MEETING} {OWN_ADDRESS}", [*arguments, "--resume", "--wire", "int8"], tmp_path / "second"
    )
    assert code == 0, said
    assert "resuming after step 2" in said
    assert losses(together)[:2] == pytest.approx(losses(alone)[:2], rel=1e-5)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-2)
    assert json.loads((together / "report.json").read_text())["config"]["wire"] == "int8"
    assert all(torch.isfinite(tensor).all() for tensor in AutoModelForCausalLM.from_pretrained(together).parameters())


def test_an_output_that_one_host_does_not_see_is_refused_before_anything_is_trained(
    deep: Inputs, hosts: Testbed, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    arguments = deep.arguments(own / "out", "--steps", "100000")
    code, said = torchrun(
        hosts, NAMED_FIRST, arguments, tmp_path / "said", first=f"mount -t tmpfs none {shlex.quote(str(own))} &&"
    )
    assert code == 1, said
    reason = f"does not see what rank 0, on {os.uname().nodename}, writes to {own / 'out'}; wanted a directory that all"
    assert said.count(f"error: output: rank 2, on {os.uname().nodename}, {reason}") == 4, said
    assert "step 1/" not in said


def test_hosts_that_do_not_reach_each_other_by_name_are_told_what_to_say(
    deep: Inputs, hosts: Testbed, tmp_path: Path
) -> None:
    # Without an address of its own torchrun tells the others its host's name, which every host takes for itself.
    code, said = torchrun(hosts, MEETING, deep.arguments(tmp_path / "out"), tmp_path / "said")
    assert code == 1, said
    assert "where no other host reaches it; give torchrun an address of the first host that all hosts reach" in said
    assert "--local-addr" in said
