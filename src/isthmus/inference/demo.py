"""The second part of ``isthmus demo``: one request on several weak devices, in every way, beside what was predicted.

Needs no download: unless a checkpoint is given, the model is four layers of BERT-base's shape with random weights,
which are as fast as trained ones.
"""

from __future__ import annotations

import os
import shutil
import socket
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
from isthmus.reporting.latency_plot import plot_latency
from isthmus.reporting.latency_table import print_latency
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan
from isthmus.spec.report import BenchInferReport, BenchInferRow
from isthmus.spec.serialization import from_json

NUM_DEVICES = 4
TOKENS = 128
_RUN_TIMEOUT_S = 240.0
_ISTHMUS = (sys.executable, "-c", "from isthmus.cli.main import app; app()")


class Ended(Protocol):
    """How a command ended on the devices."""

    @property
    def exit_code(self) -> int:
        """0, or that of the device that failed first, or not 0 after the timeout."""
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
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {"WORLD_SIZE": self._num_devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": 1}
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        with ExitStack() as stack:
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
                failed = _first_failure(processes)
                if failed or (ends_at is not None and time.monotonic() > ends_at):
                    return _Outcome(exit_code=failed or 124)
                time.sleep(0.05)
            return _Outcome(exit_code=_first_failure(processes))


def _first_failure(processes: Sequence[subprocess.Popen[Any]]) -> int:
    """The exit code that is not 0 of those that have ended, 128 + N for signal N; 0: there is none."""
    failed = next((process.returncode for process in processes if process.poll()), 0)
    return failed if failed >= 0 else 128 - failed


def run_infer_demo(
    output: Path,
    *,
    devices: Devices,
    set_bandwidth: Callable[[float], None] | None = None,
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
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as scratch:
        directory = random_bert(Path(scratch) / "model") if model is None else resolve_checkpoint(model)
        reader = ShardReader(directory)
        name = "a third of BERT-base with random weights" if model is None else model
        tokens = min(TOKENS, reader.spec.max_num_tokens)
        console.print(f"{name}: {reader.spec.num_layers} layers of {reader.spec.hidden_size}, {tokens} tokens")
        cells: dict[float | None, Sequence[BenchInferRow]] = {}
        for mbit_per_s in bandwidths_mbit_per_s if set_bandwidth is not None else (None,):
            if set_bandwidth is not None and mbit_per_s is not None:
                set_bandwidth(mbit_per_s)
            at = "" if mbit_per_s is None else f" at {mbit_per_s:g} Mbit/s"
            folder = output / ("unlimited" if mbit_per_s is None else f"{mbit_per_s:g}-mbit")
            says = f"{NUM_DEVICES} devices{at}: measuring them and their links, timing every way …"
            console.print(says)
            with console.status("about half a minute"):
                rows = _bench(devices, directory, folder, tokens, cache=Path(scratch) / "cache")
            cells[None if mbit_per_s is None else mbit_per_s * 1e6] = rows
        with console.status("comparing with transformers"):
            error = error_of_one_device(directory, reader, tokens)
    plot_latency(cells, output / "latency.png", title=f"One request of {tokens} tokens on {NUM_DEVICES} devices")
    print_latency(cells, console)
    console.print(
        f"→ what the planner takes. Errors are relative, against one device in FP32,\n"
        f"  whose hidden states differ by {error:.1e} from those of transformers.\n"
        f"latency      {output}/latency.png\n"
        f"reports      {output}/{'unlimited' if None in cells else '*-mbit'}/report.json, report.md, report.png",
        highlight=False,
    )


def _bench(devices: Devices, model: Path, folder: Path, tokens: int, *, cache: Path) -> tuple[BenchInferRow, ...]:
    """The rows of ``isthmus bench infer`` on ``devices``. Devices are measured in the first run, links in each."""
    report = folder / "report.json"
    command = [*_ISTHMUS, "bench", "infer", str(model), "--codecs", "fp32,int8", "--tokens", str(tokens)]
    command += ["--repeats", "5", "--report", str(report.absolute()), "--timeout", str(TIMEOUT_S)]
    environment = {"ISTHMUS_CACHE": str(cache)}
    ended = devices.run(command, env=environment, output=folder / "log", timeout_s=_RUN_TIMEOUT_S)
    if ended.exit_code:
        took_too_long = f"the devices took over {_RUN_TIMEOUT_S:g} s"
        failed = took_too_long if ended.exit_code == 124 else f"a device ended with exit code {ended.exit_code}"
        raise IsthmusError(f"demo: {failed}; look at what the devices said in {folder}/log")
    return from_json(BenchInferReport, report.read_text()).rows


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
