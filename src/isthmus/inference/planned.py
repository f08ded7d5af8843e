"""What a leader leaves open is planned for all devices: measure or remember, choose, tell everybody; and once more for
those that are left when some are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from isthmus.inference.engine import Engine
from isthmus.inference.profile import measure_cluster
from isthmus.inference.runtime_planner import RuntimePlanner
from isthmus.inference.session import Arrangement
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import predict
from isthmus.planning.pieces import held_bytes, pieces_on
from isthmus.planning.plans import Question
from isthmus.planning.residency import Residency, plans_to_keep
from isthmus.profiling.limits import free_memory_bytes
from isthmus.profiling.network import share_texts
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import STRATEGIES, InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group
from isthmus.transport.errors import PeerLostError, TransportError, rank_names
from isthmus.transport.reunion import Reunion
from isthmus.transport.sockets import SocketGroup

_MOST_ROWS = 512
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a leader asks for: either a ``plan`` or what it is to be made of."""

    schema_version: int = 1
    request: InferenceRequest
    plan: InferencePlan | None = None
    strategies: tuple[str, ...] = STRATEGIES
    codec: str = "fp32"
    dtype: str = "fp32"
    refresh: bool = False
    """Measure devices and links though it was done before."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the leader has planned; ``error`` where nothing fits."""

    plans: tuple[InferencePlan, ...] = ()
    is_frugal: bool = False
    error: str = ""


@dataclass
class Planner:
    """Plans what ``wish``, the leader's, leaves open. Made on all devices; ``tell`` gets what happens."""

    wish: Wish
    reader: ShardReader
    tell: Tell = lambda text: None
    _profile: ClusterProfile | None = field(default=None)
    """Of the devices that met first."""
    _room_bytes: int = 0
    """What there was before weights were read, where nothing was planned."""

    def arrange(self, group: Group | None) -> Arrangement:
        """The first device's plans, the same on all. Called on all devices; blocks for about ten seconds where devices
        have not been measured before. Raises ``IsthmusError``, on all devices, where no plan fits."""
        wish = self.wish
        if wish.plan is not None:
            self._room_bytes = free_memory_bytes()
            return Arrangement(group=group, plans=(wish.plan,))
        if group is None or group.world_size == 1:
            return Arrangement(
                group=group, plans=(InferencePlan.even("single", 1, codec=wish.codec, dtype=wish.dtype),)
            )
        self._profile = measure_cluster(
            self.reader,
            group,
            dtypes=(wish.dtype,),
            num_rows=min(_MOST_ROWS, self.reader.spec.max_num_tokens),
            refresh=wish.refresh,
            is_link_kept=True,
            progress=self.tell,
        )
        return self._planned(group, self._profile)

    def rearrange(self, group: Group) -> Arrangement:
        """As ``arrange``, for ``group`` of those that are left, by what was measured before."""
        left = group.global_ranks
        if self.wish.plan is not None:
            plan = _without(self.wish.plan, left)
            self._check_room(group, plan)
            return Arrangement(group=group, plans=(plan,))
        assert self._profile is not None
        devices, links = self._profile.devices, self._profile.links
        profile = replace(
            self._profile, devices=tuple(devices[rank] for rank in left), links=tuple(links[rank] for rank in left)
        )
        return self._planned(group, profile)

    def _check_room(self, group: Group, plan: InferencePlan) -> None:
        """Whether weights fit every device, of which each knows its own: the others' become its own. Raises on all."""
        spec, shortage = self.reader.spec, ""
        if group.rank in plan.devices:
            need = held_bytes(spec, pieces_on(group.rank, (plan,), spec))
            if need > self._room_bytes:
                rank = group.global_ranks[group.rank]
                shortage = f"rank {rank} needs {need / 2**20:.1f} MiB and has {self._room_bytes / 2**20:.1f}"
        if found := list(filter(None, share_texts(group, shortage))):
            raise IsthmusError(f"memory: weights do not fit: {'; '.join(found)}: a narrower dtype takes less")

    def _planned(self, group: Group, profile: ClusterProfile) -> Arrangement:
        question = Question(
            spec=self.reader.spec,
            request=self.wish.request,
            profile=profile,
            strategies=self.wish.strategies,
            codecs=(self.wish.codec,),
            dtypes=(self.wish.dtype,),
        )
        told = _Told()
        if group.rank == 0:
            try:
                residency = plans_to_keep(question)
                question = replace(question, is_frugal=residency.is_frugal)
                self.tell(_describe(residency, question))
                told = _Told(plans=residency.all_plans, is_frugal=residency.is_frugal)
            except IsthmusError as error:
                told = _Told(error=str(error))
        told = from_json(_Told, share_texts(group, to_json(told))[0])
        if told.error:
            raise IsthmusError(told.error)
        planner = RuntimePlanner(question, told.plans) if group.rank == 0 else None
        return Arrangement(group=group, plans=told.plans, planner=planner, is_frugal=told.is_frugal)


@dataclass
class Recovery:
    """What devices do that have lost some: meet again, plan again. An engine's ``recover``."""

    planner: Planner
    reunion: Reunion

    def __call__(self, error: PeerLostError) -> Arrangement:
        """Raises ``PeerLostError`` where another one is lost meanwhile, another ``IsthmusError`` where those that are
        left cannot go on."""
        before = self.reunion.members
        group = self.reunion.meet()
        lost = set(before) - set(group.global_ranks)
        gone = rank_names(lost) if lost else "no device"
        left = f"{group.world_size} device{'s are' if group.world_size > 1 else ' is'} left"
        self.planner.tell(f"{gone} lost; {left}")
        try:
            return self.planner.rearrange(group)
        except BaseException as reason:
            group.close()
            if isinstance(reason, IsthmusError) and not isinstance(reason, TransportError):
                raise IsthmusError(f"devices: {gone} lost, and without it: {reason}") from error
            raise


@contextmanager
def join(
    reader: ShardReader,
    wish: Wish,
    group: Group | None,
    *,
    tell: Tell = lambda text: None,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[Engine]:
    """This device's engine for what the leader's ``wish`` asks of all devices of ``group``, called on each of them. It
    goes on without those that are lost. See ``Planner.arrange`` for errors."""
    planner, recover = Planner(wish, reader, tell), None
    with ExitStack() as stack:
        if isinstance(group, SocketGroup) and group.world_size > 1:
            recover = Recovery(planner, stack.enter_context(Reunion.prepare(group)))
        arranged = planner.arrange(group)
        yield stack.enter_context(Engine(reader.directory, arranged=arranged, recover=recover, progress=progress))


def _without(plan: InferencePlan, left: tuple[int, ...]) -> InferencePlan:
    """``plan`` for those of its devices that are ``left``, by their new numbers."""
    weights = dict(zip(plan.devices, plan.weights, strict=True))
    kept = [rank for rank in left if rank in weights]
    if len(kept) == 1:
        return InferencePlan.even("single", 1, codec=plan.codec, dtype=plan.dtype)
    parts = tuple(weights[rank] for rank in kept)
    if not any(parts):  # those that had all of the work are gone
        parts = (1.0,) * len(kept)
    return replace(plan, devices=tuple(left.index(rank) for rank in kept), weights=parts)


def _describe(residency: Residency, question: Question) -> str:
    first, *others = residency.all_plans
    where = "this device alone" if len(first.devices) == 1 else f"{first.strategy} on {len(first.devices)} devices"
    text = f"{where}, about {predict(question, first).latency_s:.2g} s: {residency.reason}"
    if others:
        number = f"{len(others)} more plan{'s' if len(others) > 1 else ''}"
        text += f"; {number} kept for when links or requests change, or one proves faster"
    return text
