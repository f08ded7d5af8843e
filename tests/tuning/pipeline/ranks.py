"""Several processes that train one model, as torchrun would start them: made for a list of jobs, and always ended.

``run`` is for tests. The module itself (``python -m tests.tuning.pipeline.ranks NUM FOLDER [channels]``) imports
everything once and forks: so several processes are cheap enough for a test.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tests import reference
from transformers import AutoConfig

from isthmus.reporting.recorder import Recorder
from isthmus.spec.units import parse_emulate
from isthmus.transport.rendezvous import held_port
from isthmus.tuning.bound import StepBounds
from isthmus.tuning.output import write_final
from isthmus.tuning.pipeline.carriers.channels import Channels
from isthmus.tuning.pipeline.links import Links
from isthmus.tuning.placement import BudgetError
from isthmus.tuning.session import Session, SessionOptions

ROOT = Path(__file__).parents[3]
LEARNING_RATE = 1e-3
NUM_MICRO_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of all processes. ``options``: fields of ``SessionOptions``."""

    name: str
    model: str
    num_steps: int
    num_micro_batches: int = NUM_MICRO_BATCHES
    options: dict[str, Any] = field(default_factory=dict)
    more_slots: int | None = None
    """Emulated: each rank has the least budget it accepts, and room for so many more experts."""


def run(
    num_ranks: int, jobs: list[Job], folder: Path, *, by_channels: bool = False, timeout_s: float = 280.0
) -> dict[str, list[float]]:
    """The losses of each job; the trained models are ``folder / job.name``. ``by_channels``: tensors are carried as
    between GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.tuning.pipeline.ranks", str(num_ranks), str(folder)]
    command += ["channels"] * by_channels
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, timeout=timeout_s, check=False)
    said = "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("rank-*.log")))
    assert (folder / "losses.json").exists(), said
    return json.loads((folder / "losses.json").read_text())


def fork(num_ranks: int, folder: Path, port: int, *, by_channels: bool) -> list[int]:
    """Makes the processes, which only this one's imports are for, and returns their exit codes."""
    pids = []
    for rank in range(num_ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.dump_traceback_later(260, exit=True)
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
            }
            _train_all(folder, by_channels=by_channels)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _train_all(folder: Path, *, by_channels: bool) -> None:
    links = Links.connect(timeout_s=60.0)
    if by_channels:
        links.carry_tensors_by(Channels(torch.device("cpu"), links.timeout_s, backend="gloo"))
    losses = {}
    for fields in json.loads((folder / "jobs.json").read_text()):
        job = Job(**fields)
        losses[job.name] = _train(job, links, folder)
    links.close()
    if links.rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def _train(job: Job, links: Links, folder: Path) -> list[float]:
    path = Path(job.model)
    config = AutoConfig.from_pretrained(path)
    steps = reference.random_steps(
        job.num_steps,
        job.num_micro_batches,
        vocab_size=config.vocab_size,
        is_encoder_decoder=config.is_encoder_decoder,
    )
    fields = dict(job.options)
    if fields.get("accelerator") == "emulated":
        fields |= {"emulation": parse_emulate("h2d=200MB/s,d2h=200MB/s,threads=1"), "accelerator_memory_bytes": 1}
    options = SessionOptions(**fields)
    if job.more_slots is not None:
        try:
            Session(path, options, steps[0], Recorder(enabled=False), links=links)
        except BudgetError as error:
            memory_bytes = error.minimum_bytes + job.more_slots * 24 * 1024
            options = replace(options, accelerator_memory_bytes=memory_bytes)
    losses = []
    with Session(path, options, steps[0], Recorder(keep_spans=False), links=links) as session:
        for number, batches in enumerate(steps, start=1):
            outcome = session.train_step(batches, step=number, learning_rate=LEARNING_RATE)
            losses.append(outcome.loss)
            assert StepBounds(session).bound_s(outcome) > 0
        assert session.accelerator.peak_bytes <= session.accelerator.budget_bytes
        losses.append(session.evaluate(steps[0]))
        (folder / job.name).mkdir(exist_ok=True)
        write_final(session, folder / job.name, path)
    return losses


if __name__ == "__main__":
    with held_port() as port:
        sys.exit(any(fork(int(sys.argv[1]), Path(sys.argv[2]), port, by_channels=sys.argv[3:] == ["channels"])))
