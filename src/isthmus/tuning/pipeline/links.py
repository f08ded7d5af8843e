"""Messages between the processes of one training run: tensors from one to another, and small facts for all.

Everything goes over gloo, between GPUs through host memory. Every wait has a limit and says for what and for whom it
waited. Ranks are trusted, but nothing is pickled: facts are JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.pipeline.interface import choose_interface

DEFAULT_TIMEOUT_S = 600.0
_FACT, _FACT_REST, FIRST_FREE_TAG = 1, 2, 16
"""Tags of facts; those of tensors begin at the last one."""
_FRAME_BYTES, _LENGTH_BYTES = 4096, 8
"""A fact's first message, and what of it says how long the fact is: most need no second one."""


class RankLost(IsthmusError):
    """Another process has ended, or said nothing for the time limit."""

    exit_code = 1


@dataclass(frozen=True)
class Form:
    """What a message holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def is_one_of_several() -> bool:
    """Whether this process was started as one of several (torchrun sets WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_BLANK = bytes([0xFE, 0xCA, 0xED, 0x7F])
"""What lies at the end of memory into which nothing has been written yet; as FP32 no number."""
_ALIGNED_BYTES = 64
"""Each tensor of a message begins at a multiple of this, as memory that torch takes does."""


class Arrival:
    """Tensors that are on their way here, in one message. Their memory is taken when this is made."""

    def __init__(self, links: Links, forms: Sequence[Form], source: int, tag: int, what: str) -> None:
        self._links, self._source, self.what = links, source, what
        message, self._tensors = _memory_for(forms)
        # Looked at often: through NumPy in a tenth of the time.
        self._end = message[-len(_BLANK) :].numpy()
        self._blank = _BLANK[: len(self._end)]
        self._end[:] = list(self._blank)
        self._work = links.guarded(lambda: dist.irecv(message, source, tag=tag), source, what)

    def is_here(self) -> bool:
        """Whether ``wait`` will not block, as far as can be seen: gloo tells only who waits. False may be wrong."""
        return self._end.tobytes() != self._blank

    def wait(self) -> list[Tensor]:
        """Blocks until all are here. Raises ``RankLost``."""
        self._links.guarded(self._work.wait, self._source, self.what)
        return self._tensors


class Links:
    """This process among the others. For one thread."""

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout_s = timeout_s
        self._leaving: list[tuple[Any, Tensor, int, str]] = []

    @classmethod
    def connect(cls, timeout_s: float = DEFAULT_TIMEOUT_S) -> Links:
        """Meets the others by torchrun's variables. Blocks; raises ``RankLost`` if they do not all come, and as
        ``choose_interface``."""
        choose_interface()
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            rank, size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
            raise RankLost(f"rank {rank}: waited for {size} processes to meet: {_first_line(error)}") from error
        return cls(timeout_s)

    def close(self) -> None:
        """After success only: on an error the connections are to last until it has been told."""
        dist.destroy_process_group()

    def guarded(self, call: Any, other: int, what: str) -> Any:
        """``call()``; what it raises says that ``what`` was waited for, and from whom."""
        try:
            return call()
        except RuntimeError as error:
            reason = _first_line(error)
            if any(sign in reason for sign in ("imed out", "timeout")):
                reason = f"nothing came within {self.timeout_s:g} s"
            elif any(sign in reason for sign in ("closed", "reset", "efused", "roken pipe")):
                reason = f"rank {other} has ended"
            raise RankLost(f"rank {self.rank}: waited for {what} from rank {other}: {reason}.") from error

    # --- tensors -----------------------------------------------------------------------------------------------------

    def send(self, tensors: Sequence[Tensor], to: int, tag: int, what: str) -> None:
        """They leave for ``to``, in one message. Does not block; they must not change before ``flush``."""
        if len(tensors) == 1:
            message = tensors[0].detach().to("cpu").contiguous()
        else:
            message, places = _memory_for([Form(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor.detach())
        work = self.guarded(lambda: dist.isend(message, to, tag=tag), to, what)
        self._leaving.append((work, message, to, what))

    def receive(self, forms: Sequence[Form], source: int, tag: int, what: str) -> Arrival:
        """Tensors of these forms are awaited from now on, in one message. Does not block."""
        return Arrival(self, forms, source, tag, what)

    def flush(self) -> None:
        """Blocks until all that was sent has been taken."""
        leaving, self._leaving = self._leaving, []
        for work, _, to, what in leaving:
            self.guarded(work.wait, to, f"{what} to be taken")

    # --- facts -------------------------------------------------------------------------------------------------------

    def gather(self, fact: object, what: str) -> list[Any]:
        """Every rank's ``fact`` (JSON) in the order of ranks, the same on all. Blocks until all have called this."""
        return self.from_first(self.to_first(fact, what), what)

    def to_first(self, fact: object, what: str) -> list[Any]:
        """As ``gather``, but of use to rank 0 alone: the others do not wait, and get nothing."""
        if self.rank:
            self._tell(fact, 0, what)
            self.flush()
            return []
        return [json.loads(json.dumps(fact)), *(self._hear(other, what) for other in range(1, self.size))]

    def from_first(self, fact: object, what: str) -> Any:
        """Rank 0's ``fact`` (JSON), on all. Blocks the others until it comes."""
        if self.rank:
            return self._hear(0, what)
        for other in range(1, self.size):
            self._tell(fact, other, what)
        self.flush()
        return fact

    def _tell(self, fact: object, to: int, what: str) -> None:
        data = json.dumps(fact).encode()
        data = bytearray(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        data.extend(bytes(max(0, _FRAME_BYTES - len(data))))
        message = torch.frombuffer(data, dtype=torch.uint8)
        self.send([message[:_FRAME_BYTES]], to, _FACT, what)
        if len(data) > _FRAME_BYTES:
            self.send([message[_FRAME_BYTES:]], to, _FACT_REST, what)

    def _hear(self, source: int, what: str) -> Any:
        (frame,) = self.receive([Form((_FRAME_BYTES,), torch.uint8)], source, _FACT, what).wait()
        data = frame.numpy().tobytes()
        length = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        if length > _FRAME_BYTES:
            (rest,) = self.receive([Form((length - _FRAME_BYTES,), torch.uint8)], source, _FACT_REST, what).wait()
            data += rest.numpy().tobytes()
        return json.loads(data[_LENGTH_BYTES:length])


def _memory_for(forms: Sequence[Form]) -> tuple[Tensor, list[Tensor]]:
    """(memory for a message, its tensors as views). One tensor's is no longer than the tensor."""
    num_bytes = [prod(form.shape) * form.dtype.itemsize for form in forms]
    starts = [0]
    for length in num_bytes[:-1]:
        starts.append(starts[-1] + -(-length // _ALIGNED_BYTES) * _ALIGNED_BYTES)
    message = torch.empty(starts[-1] + num_bytes[-1], dtype=torch.uint8)
    pieces = [message[start : start + length] for start, length in zip(starts, num_bytes, strict=True)]
    return message, [piece.view(form.dtype).view(form.shape) for piece, form in zip(pieces, forms, strict=True)]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text.rpartition("] ")[2] or text
