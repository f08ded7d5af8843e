"""Messages between the processes of one training run: tensors from one to another, and small facts for all.

Facts go over gloo; tensors by a carrier (``carriers/``): over gloo too, between GPUs through host memory, or by NCCL.
Every wait has a limit and says for what and for whom it waited. Ranks are trusted, but nothing is pickled: facts are
JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.pipeline.carriers.base import Carrier
from isthmus.tuning.pipeline.carriers.tagged import TaggedCarrier
from isthmus.tuning.pipeline.interface import choose_interface

DEFAULT_TIMEOUT_S = 600.0
BACKENDS = ("gloo", "nccl")
"""What can carry tensors."""
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


_ALIGNED_BYTES = 64
"""Each tensor of a message begins at a multiple of this, as memory that torch takes does."""


class Arrival:
    """Tensors that are on their way here, in one message."""

    def __init__(self, links: Links, carrier: Carrier, forms: Sequence[Form], source: int, tag: int, what: str) -> None:
        self._links, self._source, self.what = links, source, what
        self._places = _places(forms)
        num_bytes = self._places[-1].end
        self._message = links.guarded(lambda: carrier.receive(num_bytes, source, tag), source, what)

    def is_here(self) -> bool:
        """Whether ``wait`` will not block, as far as can be seen. False may be wrong."""
        return self._message.is_here()

    def wait(self) -> list[Tensor]:
        """Blocks until all are here. Raises ``RankLost``."""
        message = self._links.guarded(self._message.wait, self._source, self.what)
        return [place.of(message) for place in self._places]


class Links:
    """This process among the others. For one thread."""

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout_s = timeout_s
        self._for_facts: Carrier = TaggedCarrier()
        self._for_tensors = self._for_facts
        self._leaving: list[tuple[Callable[[], object], Tensor, int, str]] = []

    @classmethod
    def connect(cls, timeout_s: float = DEFAULT_TIMEOUT_S) -> Links:
        """Meets the others by torchrun's variables. Blocks; raises ``RankLost`` if they do not all come, and as
        ``choose_interface``."""
        choose_interface()
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            rank, size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
            raise RankLost(f"rank {rank}: waited for {size} processes to meet: {first_line(error)}") from error
        return cls(timeout_s)

    def carry_tensors_by(self, carrier: Carrier) -> None:
        """From now on; all ranks at the same time."""
        self._for_tensors = carrier

    def close(self) -> None:
        """After success only: on an error the connections are to last until it has been told."""
        self._for_tensors.close()
        dist.destroy_process_group()

    def guarded(self, call: Any, other: int, what: str) -> Any:
        """``call()``; what it raises says that ``what`` was waited for, and from whom."""
        try:
            return call()
        except RuntimeError as error:
            reason = first_line(error)
            if any(sign in reason for sign in ("imed out", "timeout")):
                reason = f"nothing came within {self.timeout_s:g} s"
            elif any(sign in reason for sign in ("closed", "reset", "efused", "roken pipe")):
                reason = f"rank {other} has ended"
            raise RankLost(f"rank {self.rank}: waited for {what} from rank {other}: {reason}.") from error

    # --- tensors -----------------------------------------------------------------------------------------------------

    def send(self, tensors: Sequence[Tensor], to: int, tag: int, what: str) -> None:
        """They leave for ``to``, in one message. Does not block; they must not change before ``flush``."""
        carrier = self._carrier_of(tag)
        if len(tensors) == 1:
            message = tensors[0].detach().to(carrier.device).contiguous()
        else:
            places = _places([Form(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
            message = torch.empty(places[-1].end, dtype=torch.uint8, device=carrier.device)
            for place, tensor in zip(places, tensors, strict=True):
                place.of(message).copy_(tensor.detach())
        wait = self.guarded(lambda: carrier.send(message, to, tag), to, what)
        self._leaving.append((wait, message, to, what))

    def receive(self, forms: Sequence[Form], source: int, tag: int, what: str) -> Arrival:
        """Tensors of these forms are awaited from now on, in one message. Does not block."""
        return Arrival(self, self._carrier_of(tag), forms, source, tag, what)

    def _carrier_of(self, tag: int) -> Carrier:
        return self._for_tensors if tag >= FIRST_FREE_TAG else self._for_facts

    def flush(self) -> None:
        """Blocks until all that was sent has been taken."""
        leaving, self._leaving = self._leaving, []
        for wait, _, to, what in leaving:
            self.guarded(wait, to, f"{what} to be taken")

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


@dataclass(frozen=True)
class _Place:
    """Of a tensor in its message."""

    form: Form
    start: int
    end: int

    def of(self, message: Tensor) -> Tensor:
        return message[self.start : self.end].view(self.form.dtype).view(self.form.shape)


def _places(forms: Sequence[Form]) -> list[_Place]:
    """Of all tensors of a message. One tensor's is no longer than the tensor."""
    places: list[_Place] = []
    for form in forms:
        start = -(-places[-1].end // _ALIGNED_BYTES) * _ALIGNED_BYTES if places else 0
        places.append(_Place(form, start, start + prod(form.shape) * form.dtype.itemsize))
    return places


def first_line(error: BaseException) -> str:
    """What torch says, without where in its code."""
    text = str(error).strip().partition("\n")[0]
    return text.rpartition("] ")[2] or text
