"""What the verbs of ``infer`` do before and around the engine: find the devices, tell progress, leave nothing open."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from isthmus.data.tokenizer import load_tokenizer
from isthmus.inference.engine import Engine
from isthmus.inference.joining import TIMEOUT_S, WorkerAddress, invite, is_started_per_device
from isthmus.inference.planned import Wish, join
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.shards import ShardReader
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.transport.base import Group
from isthmus.transport.rendezvous import read_environment
from isthmus.transport.sockets import SocketGroup

_TOKENS = 128


@contextmanager
def open_engine(
    model: str,
    *,
    workers: Sequence[WorkerAddress] | None = None,
    strategy: str = "auto",
    codec: str = "fp32",
    dtype: str = "fp32",
    weights: Sequence[float] | None = None,
    request: InferenceRequest | None = None,
    refresh: bool = False,
    timeout_s: float = TIMEOUT_S,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Engine]:
    """An engine on all devices there are: those that torchrun or a testbed started, or this one and ``workers``.

    ``strategy`` ``auto``: as is predicted to be fastest for requests like ``request``, with all devices or fewer; they
    are measured first where that was not done before, or again with ``refresh``. ``weights``: each device's part of the
    work; without, the planner's, or evenly under a strategy that is named. ``tell`` gets what happens on the leader.
    The followers' ``with`` body is to call ``follow``. Closes engine and group. Raises ``IsthmusError`` for devices
    that do not come together or do not have the same model, and where nothing fits their memory. A device that is lost
    later makes one answer slower: the others plan again and repeat the request.
    """
    directory = resolve_checkpoint(model)
    reader = ShardReader(directory)
    digest = reader.digest()
    if workers is not None and is_started_per_device():
        raise IsthmusError("devices: got --devices and torchrun's RANK; wanted one of the two ways to start")
    num_devices = 1 + len(workers or ())
    if is_started_per_device():
        num_devices = read_environment()["world_size"]
    wish = Wish(
        request=request or InferenceRequest(num_tokens=min(_TOKENS, reader.spec.max_num_tokens)),
        codec=codec,
        dtype=dtype,
        refresh=refresh,
    )
    if strategy != "auto" or weights is not None:
        wish = replace(wish, plan=_plan(reader, num_devices, wish, strategy, weights))
    with ExitStack() as stack:
        group: Group | None = None
        if is_started_per_device():
            group = SocketGroup.from_environment(digest=digest, timeout_s=timeout_s)
        elif workers:
            group = invite(workers, model=model, digest=digest, wish=wish, timeout_s=timeout_s)
        if group is not None:
            stack.enter_context(group)
        is_leader = group is None or group.rank == 0
        progress = _progress if sys.stderr.isatty() and is_leader else lambda share: None
        told = tell if is_leader else lambda text: None
        yield stack.enter_context(join(reader, wish, group, tell=told, progress=progress))


def _plan(
    reader: ShardReader, num_devices: int, wish: Wish, strategy: str, weights: Sequence[float] | None
) -> InferencePlan:
    """All devices, without planning."""
    if weights is not None and len(weights) != num_devices:
        raise IsthmusError(f"weights: got {len(weights)}, wanted {num_devices}, one for each device")
    if strategy == "auto":
        strategy = "tensor" if reader.spec.is_decoder else "sequence"
        strategy = strategy if reader.spec.decoupling is None else "block"
    return InferencePlan(
        strategy="single" if num_devices == 1 else strategy,
        devices=tuple(range(num_devices)),
        weights=tuple(weights or (1.0,) * num_devices),
        codec=wish.codec,
        dtype=wish.dtype,
    )


def request_of(model: str, texts: Sequence[str], *, batch_size: int, num_new_tokens: int = 0) -> InferenceRequest:
    """The shape of the first batch that ``texts`` make, by the model's own tokenizer."""
    tokenizer = load_tokenizer(resolve_checkpoint(model))
    lengths = [len(ids) for ids in tokenizer(list(texts[:batch_size]))["input_ids"]]
    return InferenceRequest(num_tokens=max(1, *lengths), batch=len(lengths), num_new_tokens=num_new_tokens)


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


def read_lines(field: str, texts: Sequence[str] | None, path: Path | None) -> list[str]:
    """``texts`` and the lines of the file (- is standard input). Raises ``IsthmusError`` for none."""
    found = list(texts or ())
    if path is not None:
        found += (sys.stdin.read() if str(path) == "-" else path.read_text()).splitlines()
    if not found:
        raise IsthmusError(f"{field}: got none, wanted --{field} or --{field}-file with at least one line")
    return found


def _progress(share: float) -> None:
    """A line that is overwritten, on stderr."""
    end = "\n" if share == 1 else ""
    print(f"\rreading weights … {share:4.0%}", end=end, file=sys.stderr, flush=True)
