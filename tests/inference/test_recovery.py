"""An engine whose devices are lost: the rest answers the request, once more if need be. Devices are threads here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.inference.test_block_parallel import saved  # noqa: F401
from tests.planning.test_block_steps import profile
from tests.transport.groups import run_threads

from isthmus.inference import planned
from isthmus.inference.engine import Engine
from isthmus.inference.planned import Recovery, Wish, join
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import block_parts
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.transport.errors import PeerLostError, RendezvousError, TransportError
from isthmus.transport.rendezvous import listen
from isthmus.transport.sockets import SocketGroup

Saved = Callable[[str, str], Path]
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
ATTENDED = torch.ones_like(IDS, dtype=torch.bool)
REQUEST = InferenceRequest(num_tokens=9, batch=2)
FOREVER_S = 1000.0
"""Longer than a test may take: nothing waits for this limit."""


def _say_nothing(text: str) -> None:
    pass


class Devices:
    """Threads that are devices: the first one's is ``lead``, the others follow. Any of them can be killed."""

    def __init__(self, model: Path, plan: InferencePlan | None) -> None:
        self.told: list[str] = []
        self._model, self._plan = model, plan
        self._engines: dict[int, Engine] = {}

    def kill(self, rank: int) -> None:
        """As the system does: all its connections end without a word."""
        engine = self._engines[rank]
        assert isinstance(engine._recover, Recovery)
        session, reunion = engine._session, engine._recover.reunion
        connections = list(reunion._connections.values())
        for group in (session._group, *session._groups.values()):
            if isinstance(group, SocketGroup):
                connections += group._connections.values()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def run(self, num_devices: int, lead: Callable[[Engine], Any]) -> list[Any]:
        """What ``lead`` returned or raised, and what the others raised."""
        wish = Wish(request=REQUEST, plan=self._plan)
        started = threading.Barrier(num_devices)
        with listen("127.0.0.1") as listener:
            port = listener.getsockname()[1]

            def work(rank: int) -> Any:
                options = {"rank": rank, "world_size": num_devices, "port": port, "timeout_s": FOREVER_S}
                with (
                    SocketGroup.connect(**options, listener=listener if rank == 0 else None) as group,
                    join(
                        ShardReader(self._model), wish, group, tell=self.told.append if rank == 0 else _say_nothing
                    ) as engine,
                ):
                    self._engines[rank] = engine
                    started.wait(60)
                    return lead(engine) if rank == 0 else engine.follow()

            return run_threads([lambda rank=rank: work(rank) for rank in range(num_devices)])


def block(num_devices: int, **options: Any) -> InferencePlan:
    return InferencePlan.even("block", num_devices, **options)


def test_the_rest_answers_and_each_is_told_when_it_ends(saved: Saved) -> None:  # noqa: F811
    """One is lost between requests; the leader ends before it has noticed that another one is, too."""
    devices = Devices(saved("bert", "four"), block(4))
    wanted = Engine(saved("bert", "four")).hidden(IDS, ATTENDED)

    def lead(engine: Engine) -> list[int]:
        used = []
        for lost in (None, 2, None):
            if lost is not None:
                devices.kill(lost)
            torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-4, atol=1e-5)
            used.append(len(engine.plan.devices))
        devices.kill(3)
        return used

    led, first, second, third = devices.run(4, lead)
    assert led == [4, 3, 3] and first is None
    assert isinstance(second, RendezvousError) and "gone on without rank 2" in str(second)
    assert isinstance(third, TransportError)
    assert devices.told == ["rank 2 lost; 3 devices are left"]


def test_teams_form_anew_until_everybody_has_a_sub_block(saved: Saved) -> None:  # noqa: F811
    """Two sub-blocks on four, three and two devices."""
    devices = Devices(saved("bert", "two"), replace(block(4), originals=("tokens",)))
    wanted = Engine(saved("bert", "two")).hidden(IDS, ATTENDED)

    def lead(engine: Engine) -> list[int]:
        used = []
        for lost in (None, 3, 1):
            if lost is not None:
                devices.kill(lost)
            torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-4, atol=1e-5)
            used.append(len(engine.plan.devices))
        return used

    led, _, left, _ = devices.run(4, lead)
    assert led == [4, 3, 2] and left is None
    assert devices.told == ["rank 3 lost; 3 devices are left", "rank 1 lost; 2 devices are left"]


def test_without_the_first_all_others_end_with_an_error_that_names_it(saved: Saved) -> None:  # noqa: F811
    """Also one that has no part."""
    plan = InferencePlan(strategy="block", devices=(0, 2), weights=(1.0, 1.0))
    devices = Devices(saved("bert", "four"), plan)

    def lead(engine: Engine) -> None:
        engine.hidden(IDS, ATTENDED)
        devices.kill(0)

    for error in devices.run(3, lead)[1:]:
        assert isinstance(error, RendezvousError) and "rank 0 is lost" in str(error)


def test_one_without_a_part_ends_when_the_first_does(saved: Saved) -> None:  # noqa: F811
    plan = InferencePlan(strategy="block", devices=(0, 2), weights=(1.0, 1.0))
    devices = Devices(saved("bert", "four"), plan)
    assert devices.run(3, lambda engine: engine.hidden(IDS, ATTENDED).shape)[1:] == [None, None]


@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_tokens_that_were_given_stand_when_a_request_is_repeated(
    codec: str,
    temperature: float | None,
    saved: Saved,  # noqa: F811
) -> None:
    """Rounded, what two devices exchange leads to other tokens than what three do."""
    devices = Devices(saved("llama", "four"), block(3, codec=codec))
    settings = GenerationSettings(max_new_tokens=12, temperature=temperature, seed=5)
    streamed: list[list[int]] = []

    def watch(ids: list[int]) -> bool:
        streamed.append(ids)
        if len(streamed) == 5:
            devices.kill(1)
        return False

    found, *_ = devices.run(3, lambda engine: engine.generate_tokens(IDS, ATTENDED, settings, watch))
    assert devices.told == ["rank 1 lost; 2 devices are left"]
    assert torch.tensor(streamed).T.tolist() == found.tolist()
    if codec == "fp32":
        assert torch.equal(found, Engine(saved("llama", "four")).generate_tokens(IDS, ATTENDED, settings))


def test_who_stops_a_request_that_is_repeated_has_stopped_it(saved: Saved) -> None:  # noqa: F811
    devices = Devices(saved("llama", "four"), block(3))
    streamed: list[list[int]] = []

    def stop_at_the_fifth(ids: list[int]) -> bool:
        streamed.append(ids)
        if len(streamed) == 5:
            devices.kill(1)
        return len(streamed) == 5

    settings = GenerationSettings(max_new_tokens=50)
    found, *_ = devices.run(3, lambda engine: engine.generate_tokens(IDS, ATTENDED, settings, stop_at_the_fifth))
    assert devices.told and found.shape == (2, 5) and len(streamed) == 5


def test_a_request_is_repeated_once(saved: Saved) -> None:  # noqa: F811
    """The caller of one that fails twice is told, and those that are left answer the next."""
    devices = Devices(saved("llama", "four"), block(4))
    settings = GenerationSettings(max_new_tokens=9)
    num_tokens = 0

    def kill_two(ids: list[int]) -> bool:
        nonlocal num_tokens
        num_tokens += 1
        if num_tokens in (3, 6):
            devices.kill(num_tokens // 3)
        return False

    def lead(engine: Engine) -> torch.Tensor:
        with pytest.raises(PeerLostError):
            engine.generate_tokens(IDS, ATTENDED, settings, kill_two)
        return engine.generate_tokens(IDS, ATTENDED, settings)

    found, *_ = devices.run(4, lead)
    assert torch.equal(found, Engine(saved("llama", "four")).generate_tokens(IDS, ATTENDED, settings))
    assert devices.told == ["rank 1 lost; 3 devices are left", "rank 2 lost; 2 devices are left"]


def test_one_that_is_lost_while_the_rest_plans_is_done_without(
    saved: Saved,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = Devices(saved("bert", "four"), block(4))
    wanted = Engine(saved("bert", "four")).hidden(IDS, ATTENDED)
    share_texts = planned.share_texts

    def end_with_the_last(group: SocketGroup, text: str) -> list[str]:
        if group.global_ranks[group.rank] == 3:
            raise OSError("no power")
        return share_texts(group, text)

    monkeypatch.setattr(planned, "share_texts", end_with_the_last)

    def lead(engine: Engine) -> int:
        devices.kill(1)
        torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-4, atol=1e-5)
        return len(engine.plan.devices)

    assert devices.run(4, lead)[0] == 2
    assert devices.told == ["rank 1 lost; 3 devices are left", "rank 3 lost; 2 devices are left"]


def test_those_that_are_left_plan_by_what_was_measured_before(
    saved: Saved,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody has named a plan. One that is twice as fast gets two of the four sub-blocks when another is lost."""
    model = saved("bert", "four")
    spec = ShardReader(model).spec
    measured = profile(spec, (1e6, 1e6, 2e6, 1e6), 1e8)  # so slow that all are needed
    monkeypatch.setattr(planned, "measure_cluster", lambda *arguments, **options: measured)
    devices = Devices(model, None)
    wanted = Engine(model).hidden(IDS, ATTENDED)

    def lead(engine: Engine) -> list[list[int]]:
        used = []
        for lost in (None, 1, 2):
            if lost is not None:
                devices.kill(lost)
            for _ in range(2):
                torch.testing.assert_close(engine.hidden(IDS, ATTENDED), wanted, rtol=1e-4, atol=1e-5)
            used.append([len(part.sub_blocks) for part in block_parts(engine.plan, spec)])
        return used

    assert devices.run(4, lead)[0] == [[1, 1, 1, 1], [1, 2, 1], [2, 2]]
    found = [text for text in devices.told if "lost" in text]
    assert found == ["rank 1 lost; 3 devices are left", "rank 2 lost; 2 devices are left"]


def test_without_the_memory_the_error_says_what_is_missing(
    saved: Saved,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On all that are left; and whoever asks again hears it again."""
    devices = Devices(saved("bert", "four"), block(3))
    monkeypatch.setattr(planned, "free_memory_bytes", lambda: 30_000)

    def lead(engine: Engine) -> str:
        engine.hidden(IDS, ATTENDED)
        devices.kill(1)
        with pytest.raises(
            IsthmusError, match=r"rank 1 lost, and without it: memory: .*rank 0 needs 0\.1 MiB and has 0"
        ):
            engine.hidden(IDS, ATTENDED)
        with pytest.raises(TransportError, match="the session is over"):
            engine.hidden(IDS, ATTENDED)
        return "told"

    led, _, other = devices.run(3, lead)
    assert led == "told" and "memory: weights do not fit" in str(other)


def test_nothing_is_left_behind(saved: Saved) -> None:  # noqa: F811
    process = psutil.Process()

    def there() -> tuple[int, int, int]:
        listening = [each for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
        return process.num_fds(), threading.active_count(), len(listening)

    def lead(engine: Engine) -> None:
        for lost in (1, 2):
            engine.hidden(IDS, ATTENDED)
            devices.kill(lost)
        engine.hidden(IDS, ATTENDED)

    before = there()
    devices = Devices(saved("bert", "four"), block(4))
    devices.run(4, lead)
    assert there() == before
