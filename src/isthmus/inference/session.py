"""``Session``: devices that have met, with the plans whose weights they keep, and one request after the other.

Every request begins with a header that all receive, so that devices never disagree about what comes next. With several
plans it says which: all of them stay loaded, so that another one for the next request moves no weights.

Shapes: B batch, T tokens, H hidden size, N devices.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.inference.execution import Execution
from isthmus.inference.generation import OnTokens
from isthmus.inference.layer import Layer
from isthmus.inference.runtime_planner import Answer, RuntimePlanner
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import team_of
from isthmus.planning.pieces import Piece, cut, pieces_on
from isthmus.planning.workload import HEADER_VALUES, check_strategy
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json
from isthmus.training.heap import return_freed_memory, reuse_freed_memory
from isthmus.transport.base import Group
from isthmus.transport.endpoint import TransportStats
from isthmus.transport.errors import TransportError


class Task(enum.IntEnum):
    """What is asked for."""

    STOP = 0
    TOTAL = 1
    """The sum (B, H) of the hidden states of the tokens that are not padding."""
    HIDDEN = 2
    """The last hidden states (B, T, H)."""
    GENERATE = 3


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What the devices of a session have agreed on."""

    group: Group | None
    """None: this device is alone."""
    plans: tuple[InferencePlan, ...]
    planner: RuntimePlanner | None = None
    """The leader's: picks one of the plans for each request, or says that none fits; without, it is the first."""
    is_frugal: bool = False
    """Whether what plans have in common of a layer is kept once (``pieces.cut``), and requests that would not fit else
    are computed with freed memory given back at once."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What followers are told of a request for tokens."""

    schema_version: int = 1
    settings: GenerationSettings
    given: tuple[tuple[int, ...], ...] = ()
    """See ``Generation.run``."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A request that the leader has chosen a plan for."""

    asked: InferenceRequest
    number: int
    execution: Execution
    gives_back: bool
    begun_s: float


class Session:
    """The device with rank 0 leads; the others follow. ``close`` ends their session too."""

    def __init__(
        self,
        reader: ShardReader,
        arranged: Arrangement,
        *,
        progress: Callable[[float], None] = lambda share: None,
        known: dict[Piece, Layer] | None = None,
    ) -> None:
        """Reads this device's part of every plan, but for what ``known`` has; adds it there. Called on every device of
        the group with the same plans."""
        group, plans = arranged.group, arranged.plans
        num_devices = group.world_size if group is not None else 1
        for each in plans:
            if each.devices[-1] >= num_devices or each.devices[0] != 0:
                raise IsthmusError(
                    f"devices: got ranks {each.devices} in the plan for {num_devices}, wanted 0 among them"
                )
            check_strategy(each, reader.spec)
        self.plans = plans
        self.plan = self.plans[0]
        """Of the last request."""
        self._group, self._planner, self._is_frugal = group, arranged.planner, arranged.is_frugal
        self._rank = group.rank if group is not None else 0
        self._groups: dict[tuple[int, ...], Group] = {}
        self._members = tuple(sorted({device for each in plans for device in each.devices}))
        """Devices that some plan needs; the leader tells them what comes."""
        self._executions: list[Execution | None] = []
        self._last: Execution | None = None
        self._answer: Answer | None = None
        """The last one, of which the planner has not heard."""
        self._over: BaseException | None = None
        try:
            self._everybody = self._group_of(self._members)
            # All groups first: reading may take longer than anybody waits.
            working = [
                (self._group_of(each.devices), self._group_of(team_of(each, reader.spec, self._rank))) for each in plans
            ]
            self._read(reader, working, progress, {} if known is None else known)
        except BaseException as error:
            self.abandon(error)
            raise

    def _read(
        self,
        reader: ShardReader,
        working: Sequence[tuple[Group | None, Group | None]],
        progress: Callable[[float], None],
        known: dict[Piece, Layer],
    ) -> None:
        kept = cut(reader.spec, pieces_on(self._rank, self.plans, reader.spec), is_frugal=self._is_frugal)
        for number, (plan, (group, mates)) in enumerate(zip(self.plans, working, strict=True)):
            before = number / len(self.plans)

            def told(share: float, before: float = before) -> None:
                progress(before + share / len(self.plans))

            has_part = self._rank in plan.devices
            made = Execution(plan, reader, group, told, known, mates=mates, kept=kept) if has_part else None
            self._executions.append(made)

    def close(self) -> None:
        """Lets the followers go. The group stays open: it is the caller's."""
        if self._rank == 0 and self._everybody is not None and self._executions:
            self._collected()
            self._announce(Task.STOP)
        self._end(TransportError("it is closed"))
        for group in self._groups.values():
            group.close()

    def abandon(self, error: BaseException) -> None:
        """Tells the others, as far as that is possible, that the session is over because of ``error``."""
        self._end(error)
        for group in (*self._groups.values(), self._group):
            if group is not None:
                group.fail(error)
                group.close()

    def _end(self, error: BaseException) -> None:
        self._executions, self._last = [], None
        self._over = self._over or error

    def _check_goes_on(self) -> None:
        if self._over is not None:
            raise TransportError(f"the session is over ({self._over}): open another one") from self._over

    @property
    def has_part(self) -> bool:
        """Whether some plan needs this device."""
        return self._rank in self._members

    @property
    def executions(self) -> list[Execution]:
        """Of the plans that this device has a part in; none once the session is closed."""
        return [execution for execution in self._executions if execution is not None]

    @property
    def stats(self) -> TransportStats | None:
        """What this device has sent and received with others; None where it works with no other. Where a plan has all
        devices of the group, what went over the group before is in it."""
        everybody = (self._everybody, *(group for execution in self.executions for group in execution.groups))
        groups = {id(group): group for group in everybody if group}
        return TransportStats.total(group.stats for group in groups.values()) if groups else None

    # --- the leader ---------------------------------------------------------------------------------------------------

    def compute(self, task: Task, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        """What ``task`` asks for."""
        begun = self._begin(_request_of(ids_BT))
        self._tell(begun, task, ids_BT, attended_BT)
        found = _compute(task, begun.execution, ids_BT, attended_BT)
        seconds = time.perf_counter() - begun.begun_s
        self._answer = Answer(request=begun.asked, number=begun.number, seconds=seconds)
        return found

    def generate(
        self,
        ids_BT: Tensor,
        attended_BT: Tensor,
        settings: GenerationSettings,
        on_tokens: OnTokens,
        given: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """New tokens (B, n); see ``Generation.run``."""
        wanted = Continuation(settings=settings, given=tuple(map(tuple, given)))
        text = torch.frombuffer(bytearray(to_json(wanted).encode()), dtype=torch.uint8)
        begun, passing_on_s = self._begin(_request_of(ids_BT, settings.max_new_tokens)), 0.0

        def pass_on(ids: list[int]) -> bool:
            nonlocal passing_on_s
            start_s = time.perf_counter()
            stops = on_tokens(ids)
            passing_on_s += time.perf_counter() - start_s
            return stops

        self._tell(begun, Task.GENERATE, ids_BT, attended_BT, len(text))
        if begun.execution.group is not None:
            begun.execution.group.broadcast(text)
        found = begun.execution.generate(ids_BT, attended_BT, settings, pass_on, wanted.given)
        seconds = time.perf_counter() - begun.begun_s - passing_on_s
        self._answer = Answer(request=_request_of(ids_BT, found.shape[1]), number=begun.number, seconds=seconds)
        return found

    def _begin(self, asked: InferenceRequest) -> _Begun:
        """Chooses a plan for the next request. Raises ``IsthmusError``, asking nobody, where none fits."""
        self._check_goes_on()
        number, gives_back = 0, False
        rates_NN = self._collected()
        if self._planner is not None:
            self._planner.observe(rates_NN.tolist(), self._answer)
            number = self._planner.choose(asked)
            gives_back = self._planner.gives_back(asked, number)
        self._answer = None
        self.plan, execution = self.plans[number], self._executions[number]
        assert execution is not None
        return _Begun(
            asked=asked, number=number, execution=execution, gives_back=gives_back, begun_s=time.perf_counter()
        )

    def _tell(self, begun: _Begun, task: Task, ids_BT: Tensor, attended_BT: Tensor, num_text_bytes: int = 0) -> None:
        """Gives the tokens to the devices of the plan."""
        self._announce(task, *ids_BT.shape, num_text_bytes, begun.number, begun.gives_back)
        self._mind_memory(begun.gives_back)
        self._last = begun.execution
        if begun.execution.group is not None:
            begun.execution.group.broadcast(torch.stack((ids_BT, attended_BT.long())))

    def _announce(self, task: Task, *header: int) -> None:
        if self._everybody is not None:
            self._everybody.broadcast(torch.tensor([task, *header, *[0] * (HEADER_VALUES - 1 - len(header))]))

    def _mind_memory(self, gives_back: bool) -> None:
        """Of this request."""
        if self._is_frugal:
            (return_freed_memory if gives_back else reuse_freed_memory)()

    def _collected(self) -> Tensor:
        """Bytes a second (N, N) that each device (row) got from each (column) in the last request; 0 where nothing is
        known. The others have sent theirs once they were done: nobody waits for them who would not wait anyway."""
        size = 1 if self._group is None else self._group.world_size
        rates_NN, execution = torch.zeros(size, size), self._last
        if len(self.plans) > 1 and execution is not None and execution.group is not None:
            assert self._everybody is not None
            rates_NN[0] = self._rates(execution)
            for device in execution.plan.devices[1:]:
                self._everybody.recv(rates_NN[device], self._members.index(device))
        self._last = None
        return rates_NN

    # --- the others ---------------------------------------------------------------------------------------------------

    def follow_once(self) -> bool:
        """Computes one request, or learns that it is not needed for it. False: the leader has closed, or this device
        has no part in any plan."""
        self._check_goes_on()
        if self._everybody is None:
            return False
        self._everybody.await_message(0)
        header = torch.empty(HEADER_VALUES, dtype=torch.int64)
        self._everybody.broadcast(header)
        task, batch, num_tokens, num_text_bytes, number, gives_back = header.tolist()
        if task == Task.STOP:
            return False
        self.plan, execution = self.plans[number], self._executions[number]
        if execution is None or execution.group is None:
            return True
        self._mind_memory(bool(gives_back))
        tokens = torch.empty(2, batch, num_tokens, dtype=torch.int64)
        execution.group.broadcast(tokens)
        ids_BT, attended_BT = tokens[0], tokens[1].bool()
        if task == Task.GENERATE:
            text = torch.empty(num_text_bytes, dtype=torch.uint8)
            execution.group.broadcast(text)
            wanted = from_json(Continuation, bytes(text.tolist()).decode())
            execution.generate(ids_BT, attended_BT, wanted.settings, lambda ids: False, wanted.given)
        else:
            _compute(Task(task), execution, ids_BT, attended_BT)
        if len(self.plans) > 1:
            self._everybody.send(self._rates(execution), 0)
        return True

    def _rates(self, execution: Execution) -> Tensor:
        """Bytes a second (N,) that this device got from each in the last request; 0 where nothing is known."""
        assert self._group is not None
        ranks = {number: rank for rank, number in enumerate(self._group.global_ranks)}
        rates_N = torch.zeros(self._group.world_size)
        for group in execution.groups:
            for peer, rate in group.take_arrival_rates().items():
                rates_N[ranks[group.global_ranks[peer]]] = rate
        return rates_N

    def _group_of(self, devices: tuple[int, ...]) -> Group | None:
        """Of those devices, made once; None where this is the only one or not among them. Called on all alike."""
        group = self._group
        if group is None or group.rank not in devices or len(devices) == 1:
            return None
        if len(devices) == group.world_size and len(self.plans) == 1:
            return group
        if devices not in self._groups:
            self._groups[devices] = group.subgroup(devices)
        return self._groups[devices]


def _compute(task: Task, execution: Execution, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
    compute = execution.hidden if task == Task.HIDDEN else execution.total
    return compute(ids_BT, attended_BT)


def _request_of(ids_BT: Tensor, num_new_tokens: int = 0) -> InferenceRequest:
    batch, num_tokens = ids_BT.shape
    return InferenceRequest(num_tokens=num_tokens, batch=batch, num_new_tokens=num_new_tokens)
