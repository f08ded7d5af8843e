"""The parts of ``isthmus demo`` that answer one request on several weak devices, in every way, beside what was
predicted: ``infer`` with one model, ``latency`` with a model and its decoupled copy.

Needs no download: unless a checkpoint is given, the model of ``infer`` is four layers of BERT-base's shape with random
weights, which are as fast as trained ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from transformers import AutoModel, BertConfig, BertModel
from transformers.utils import logging

from isthmus.inference.engine import Engine
from isthmus.inference.joining import TIMEOUT_S
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.shards import ShardReader
from isthmus.reporting.latency_plot import Cells, plot_latency
from isthmus.reporting.latency_table import print_latency
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan
from isthmus.spec.report import BenchInferReport, BenchInferRow
from isthmus.spec.serialization import from_json
from isthmus.transport.rendezvous import held_port

NUM_DEVICES = 4
TOKENS = 128
_RUN_TIMEOUT_S = 240.0
SetBandwidth = Callable[[float], None]
"""Limits the links of all devices, in Mbit/s."""
_ISTHMUS = (sys.executable, "-c", "from isthmus.cli.main import app; app()")


class Ended(Protocol):
    """How a command ended on the devices."""

    @property
    def exit_code(self) -> int:
        """0, or that of the device that failed first, or not 0 after the timeout."""
        ...

    @property
    def failed_device(self) -> int | None:
        """The one that failed first; None: none has."""
        ...


class Devices(Protocol):
    """Devices that run a command once each, at the same time, with torchrun's variables. A ``Testbed`` is some."""

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        timeout_s: float | None = None,
    ) -> Ended: ...


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    exit_code: int
    failed_device: int | None = None


class LocalProcesses:
    """Devices that are plain processes of this machine: one thread each, no limits, no slow links."""

    def __init__(self, num_devices: int) -> None:
        self._num_devices = num_devices

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        timeout_s: float | None = None,
    ) -> _Outcome:
        """Blocks until all have ended, the first has failed, or ``timeout_s`` have passed; then none is left, nor after
        an exception. ``output``: as for a testbed."""
        shared = {"WORLD_SIZE": self._num_devices, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        with ExitStack() as stack:
            shared["MASTER_PORT"] = stack.enter_context(held_port())
            processes: list[subprocess.Popen[Any]] = []
            for rank in range(self._num_devices):
                variables = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
                files: dict[str, Any] = {}
                if output is not None:
                    output.mkdir(parents=True, exist_ok=True)
                    for stream, ending in (("stdout", "out"), ("stderr", "err")):
                        files[stream] = stack.enter_context((output / f"device-{rank}.{ending}").open("wb"))
                variables = {**os.environ, **(env or {}), **variables}
                process = subprocess.Popen(argv, env=variables, stdin=subprocess.DEVNULL, **files)
                stack.callback(process.wait)
                stack.callback(process.kill)
                processes.append(process)
            while any(process.poll() is None for process in processes):
                if (failed := _first_failure(processes)) is not None:
                    return failed
                if ends_at is not None and time.monotonic() > ends_at:
                    return _Outcome(exit_code=124)
                time.sleep(0.05)
            return _first_failure(processes) or _Outcome(exit_code=0)


def _first_failure(processes: Sequence[subprocess.Popen[Any]]) -> _Outcome | None:
    """That of a process which ended otherwise than well, 128 + N for signal N; None: there is none."""
    for device, process in enumerate(processes):
        if code := process.poll():
            return _Outcome(exit_code=code if code > 0 else 128 - code, failed_device=device)
    return None


def run_infer_demo(
    output: Path,
    *,
    devices: Devices,
    set_bandwidth: SetBandwidth | None = None,
    bandwidths_mbit_per_s: Sequence[float] = (250, 50),
    model: str | None = None,
    console: Console | None = None,
) -> None:
    """Writes ``latency.png`` and a folder per bandwidth below ``output``, replacing an earlier demo's, and prints the
    table. Blocks for about a minute on two cores.

    ``set_bandwidth`` limits the devices' links, to each of ``bandwidths_mbit_per_s`` in turn; None: they cannot be
    limited, and one run is made. ``model``: a checkpoint instead of the random one. Raises ``IsthmusError`` when a
    device fails.
    """
    console = console or Console(stderr=True)
    logging.disable_progress_bar()  # of a checkpoint that is read in a moment
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as scratch:
        directory = random_bert(Path(scratch) / "model") if model is None else resolve_checkpoint(model)
        reader = ShardReader(directory)
        name = "a third of BERT-base with random weights" if model is None else model
        tokens = _tokens(reader)
        console.print(f"{name}: {reader.spec.num_layers} layers of {reader.spec.hidden_size}, {tokens} tokens")
        sweep = _Sweep(output, devices, set_bandwidth, console)
        asked = [str(directory), "--codecs", "fp32,int8", "--tokens", str(tokens)]
        cells = sweep.run(asked, bandwidths_mbit_per_s)
        with console.status("comparing with transformers"):
            error = error_of_one_device(directory, reader, tokens)
    sweep.show(
        cells,
        title=f"One request of {tokens} tokens on {NUM_DEVICES} devices",
        note="→ what the planner takes. Errors are relative, against one device in FP32,\n"
        f"  whose hidden states differ by {error:.1e} from those of transformers.",
    )


def run_latency_demo(
    output: Path,
    *,
    model: Path,
    decoupled: Path,
    devices: Devices,
    set_bandwidth: SetBandwidth | None = None,
    bandwidths_mbit_per_s: Sequence[float] = (1000, 250, 50),
    console: Console | None = None,
) -> None:
    """As ``run_infer_demo``, of ``model`` on one device and under tensor and sequence parallelism, and of its
    ``decoupled`` copy under block parallelism, FP32 on the wire, in one picture. Blocks for a minute and a half."""
    console = console or Console(stderr=True)
    reader, copy = ShardReader(model), ShardReader(decoupled)
    spec, tokens = reader.spec, _tokens(reader)
    title = (
        f"{spec.model_type} ({spec.num_parameters / 1e6:.2g}M) and its copy in {copy.spec.num_sub_blocks} sub-blocks: "
        f"{tokens} tokens, {NUM_DEVICES} devices"
    )
    console.print(title)
    sweep = _Sweep(output, devices, set_bandwidth, console)
    asked = [str(model), "--decoupled", str(decoupled), "--strategies", "single,tensor,sequence,block"]
    cells = sweep.run([*asked, "--tokens", str(tokens)], bandwidths_mbit_per_s)
    sweep.show(
        cells,
        title=title,
        note="→ what the planner takes for each of the two models.",
    )


def _tokens(reader: ShardReader) -> int:
    return min(TOKENS, reader.spec.max_num_tokens)


@dataclass(frozen=True)
class _Sweep:
    """``isthmus bench infer`` on ``devices``, once for each bandwidth of their links; all that comes of it is below
    ``output``."""

    output: Path
    devices: Devices
    set_bandwidth: SetBandwidth | None
    console: Console

    def run(self, asked: Sequence[str], bandwidths_mbit_per_s: Sequence[float]) -> Cells:
        """The rows by bandwidth. ``asked``: the model, and options of the bench. What was there before is removed."""
        if self.output.exists():
            shutil.rmtree(self.output)
        self.output.mkdir(parents=True)
        cells: dict[float | None, Sequence[BenchInferRow]] = {}
        with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as cache:
            for mbit_per_s in bandwidths_mbit_per_s if self.set_bandwidth is not None else (None,):
                if self.set_bandwidth is not None and mbit_per_s is not None:
                    self.set_bandwidth(mbit_per_s)
                at = "" if mbit_per_s is None else f" at {mbit_per_s:g} Mbit/s"
                folder = self.output / ("unlimited" if mbit_per_s is None else f"{mbit_per_s:g}-mbit")
                says = f"{NUM_DEVICES} devices{at}: measuring them and their links, timing every way …"
                self.console.print(says)
                with self.console.status("about half a minute"):
                    rows = self._bench(asked, folder, cache)
                cells[None if mbit_per_s is None else mbit_per_s * 1e6] = rows
        return cells

    def _bench(self, asked: Sequence[str], folder: Path, cache: str) -> tuple[BenchInferRow, ...]:
        """Devices are measured in the first run, links in each."""
        report = folder / "report.json"
        command = [*_ISTHMUS, "bench", "infer", *asked]
        command += ["--repeats", "5", "--report", str(report.absolute()), "--timeout", str(TIMEOUT_S)]
        environment = {"ISTHMUS_CACHE": cache}
        ended = self.devices.run(command, env=environment, output=folder / "log", timeout_s=_RUN_TIMEOUT_S)
        if (device := ended.failed_device) is not None:
            told = (folder / "log" / f"device-{device}.err").read_text(errors="replace").splitlines()
            raise IsthmusError(
                f"demo: device {device} ended with exit code {ended.exit_code}; look at what the devices said in "
                f"{folder}/log; its last words: {told[-1] if told else 'nothing'}"
            )
        if ended.exit_code:
            raise IsthmusError(
                f"demo: the devices took over {_RUN_TIMEOUT_S:g} s; look at what they said in {folder}/log"
            )
        return from_json(BenchInferReport, report.read_text()).rows

    def show(self, cells: Cells, *, title: str, note: str) -> None:
        """Draws and prints them, and says where all is."""
        output = self.output
        plot_latency(cells, output / "latency.png", title=title)
        print_latency(cells, self.console)
        self.console.print(
            f"{note}\n"
            f"latency      {output}/latency.png\n"
            f"reports      {output}/{'unlimited' if None in cells else '*-mbit'}/report.json, report.md, report.png",
            highlight=False,
        )


def random_bert(directory: Path) -> Path:
    """Writes a third of BERT-base, 36 million parameters, in Hugging Face format."""
    shape = BertConfig(num_hidden_layers=4, vocab_size=8192)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(shape).save_pretrained(directory)
    return directory


def error_of_one_device(directory: Path, reader: ShardReader, tokens: int) -> float:
    """The largest difference of our hidden states on one device from transformers', by the largest of theirs."""
    ids_BT = torch.randint(reader.spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    attended_BT = torch.ones_like(ids_BT)
    with Engine(directory, plan=InferencePlan.even("single", 1)) as engine:
        ours_BTH = engine.hidden(ids_BT, attended_BT.bool())
    module = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs_BTH = module(input_ids=ids_BT, attention_mask=attended_BT).last_hidden_state
    return float((ours_BTH - theirs_BTH).abs().max() / theirs_BTH.abs().max())
