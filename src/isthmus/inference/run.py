"""What the verbs of ``infer`` do before and around the engine: find the devices, tell progress, leave nothing open."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from isthmus.inference.engine import Engine
from isthmus.inference.joining import TIMEOUT_S, WorkerAddress, invite, is_started_per_device
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.shards import ShardReader
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan
from isthmus.transport.base import Group
from isthmus.transport.rendezvous import read_environment
from isthmus.transport.sockets import SocketGroup


@contextmanager
def open_engine(
    model: str,
    *,
    workers: Sequence[WorkerAddress] | None = None,
    strategy: str | None = None,
    codec: str = "fp32",
    dtype: str = "fp32",
    weights: Sequence[float] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Engine]:
    """An engine on all devices there are: those that torchrun or a testbed started, or this one and ``workers``.

    ``strategy`` None: sequence for encoders, tensor for decoders. ``weights``: each device's part of the work, evenly
    if None. The followers' ``with`` body is to call ``follow``. Closes engine and group. Raises ``IsthmusError`` for
    devices that do not come together or do not have the same model.
    """
    directory = resolve_checkpoint(model)
    reader = ShardReader(directory)
    digest = reader.digest()
    if workers is not None and is_started_per_device():
        raise IsthmusError("devices: got --devices and torchrun's RANK; wanted one of the two ways to start")
    num_devices = 1 + len(workers or ())
    if is_started_per_device():
        num_devices = read_environment()["world_size"]
    if weights is not None and len(weights) != num_devices:
        raise IsthmusError(f"weights: got {len(weights)}, wanted {num_devices}, one for each device")
    default = "tensor" if reader.spec.is_decoder else "sequence"
    plan = InferencePlan(
        strategy="single" if num_devices == 1 else strategy or default,
        devices=tuple(range(num_devices)),
        weights=tuple(weights or (1.0,) * num_devices),
        codec=codec,
        dtype=dtype,
    )
    with ExitStack() as stack:
        group: Group | None = None
        if is_started_per_device():
            group = SocketGroup.from_environment(digest=digest, timeout_s=timeout_s)
        elif workers:
            group = invite(workers, model=model, digest=digest, plan=plan, timeout_s=timeout_s)
        if group is not None:
            stack.enter_context(group)
        progress = _progress if sys.stderr.isatty() and (group is None or group.rank == 0) else lambda share: None
        yield stack.enter_context(Engine(directory, group=group, plan=plan, progress=progress))


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers with commas between them. Raises ``IsthmusError`` for others, for negative ones, and for zeros only."""
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise IsthmusError(f"weights: got {text!r}, wanted numbers from 0 up with commas, such as 0.2,0.45,0.6")
    return weights


def _progress(share: float) -> None:
    """A line that is overwritten, on stderr."""
    end = "\n" if share == 1 else ""
    print(f"\rreading weights … {share:4.0%}", end=end, file=sys.stderr, flush=True)
