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

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("hosts"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
# RANK and MASTER_ADDR are what a testbed sets: which of the hosts this is, and the first one's address.
NAMED_FIRST = '--node-rank "$RANK" --master-addr "$MASTER_ADDR"'
MEETING = "--rdzv-backend c10d --rdzv-endpoint host-0:29400"
# A network namespace has the names of its machine, and no way to ask for others.
OWN_NAMES = 'hostname "host-$RANK" && mount --bind "$NAMES/$RANK" /etc/hosts && mount --bind /dev/null /etc/resolv.conf'


@pytest.fixture(scope="module")
def hosts() -> Iterator[Testbed]:
    device = DeviceSpec(cpu_share=float(os.cpu_count() or 1), bandwidth_bits_per_s=1e9)
    spec = TestbedSpec(name=f"t{secrets.token_hex(4)}", devices=(device, device))
    try:
        check_host(spec)
    except IsthmusError as error:
        pytest.skip(str(error))
    with Testbed.up(spec) as testbed:
        yield testbed


@pytest.fixture(scope="module")
def deep(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """As ``inputs``, with a model of four layers."""
    model = tmp_path_factory.mktemp("deep") / "model"
    write_tiny_checkpoint("mixtral", model, 0, "fp32", vocab_size=VOCAB_SIZE, num_hidden_layers=4)
    for file in inputs.model.glob("*token*"):
        shutil.copy(file, model)
    return Inputs(model, inputs.data, inputs.eval_data)


def torchrun(
    hosts: Testbed,
    meeting: str,
    arguments: list[str],
    folder: Path,
    *,
    first: str = "true",
    own_address: str | None = None,
) -> tuple[int, str]:
    """Exit code, and what both hosts said. ``first``: a shell command before it, which sees each host's own mounts.
    ``own_address``: what a host's own name stands for there, if not for what it does elsewhere."""
    folder.mkdir()
    addresses = [hosts.state.layout.address(device) for device in range(2)]
    for rank in range(2):
        known = enumerate(
            [own_address or address if host == rank else address for host, address in enumerate(addresses)]
        )
        lines = ["127.0.0.1 localhost", *(f"{address} host-{host}" for host, address in known)]
        (folder / f"{rank}").write_text("\n".join(lines) + "\n")
    run = shlex.join([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"])
    command = f"{OWN_NAMES} && {first} && exec {run} {meeting} -m isthmus {shlex.join(arguments)}"
    variables = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NAMES": str(folder)}
    outcome = hosts.run(
        ["env", "-u", "GLOO_SOCKET_IFNAME", "unshare", "--uts", "sh", "-c", command],
        env=variables,
        output=folder,
        timeout_s=400.0,
    )
    return outcome.exit_code, "\n".join(file.read_text() for file in sorted(folder.glob("device-*")))


def test_two_hosts_make_the_model_that_one_process_makes(
    deep: Inputs, hosts: Testbed, run: Tune, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    succeed(run(deep.arguments(alone)))

    arguments = deep.arguments(together, "--num-stages", "4", "--save-every", "2")
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
    code, said = torchrun(hosts, MEETING, [*arguments, "--resume", "--wire", "int8"], tmp_path / "second")
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
    mounting = f"mount -t tmpfs none {shlex.quote(str(own))}"
    code, said = torchrun(hosts, NAMED_FIRST, arguments, tmp_path / "said", first=mounting)
    assert code == 1, said
    reason = (
        f"rank 2, on host-1, does not see what rank 0, on host-0, writes to {own / 'out'}; wanted a directory that all"
    )
    assert said.count(f"error: output: {reason}") == 4, said
    assert "step 1/" not in said


def test_a_host_whose_own_name_means_only_itself_there_is_told_what_to_say(
    deep: Inputs, hosts: Testbed, tmp_path: Path
) -> None:
    arguments = deep.arguments(tmp_path / "out")
    code, said = torchrun(hosts, MEETING, arguments, tmp_path / "said", own_address="127.0.1.1")
    assert code == 1, said
    assert (
        "error: MASTER_ADDR: rank 0 got host-0, here a loopback address, which no other host reaches; give torch"
        in said
    )
