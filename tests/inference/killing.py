"""Kills processes that answer requests together, at any moment, and checks what the others do then."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.inference.losing import Connection, Event, Round

PATIENCE_S = 90.0
"""So long nobody waits who does not hang."""
ERROR = 1e-5
"""Relative, of an answer with FP32 on the wire."""


@dataclass(kw_only=True)
class Request:
    """What the leader said of one."""

    asked_s: float
    end_s: float = float("inf")
    error: float | None = None
    """None: there is no answer."""
    num_devices: int = 0
    lost: list[int] = field(default_factory=list)
    """Ranks that were found to be lost on the way."""


@dataclass(kw_only=True)
class Tally:
    """What came of some rounds."""

    kills: Counter[str] = field(default_factory=Counter)
    """By what was going on: ``joining``, ``between``, ``request`` or ``recovery``."""
    answers: Counter[int] = field(default_factory=Counter)
    """Right ones, by the number of devices."""
    largest_error: float = 0.0
    repeated: int = 0
    failed_twice: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Rounds that ended with the error that is documented: ``memory`` or ``joining``."""
    recoveries_s: list[float] = field(default_factory=list)
    """From the loss, or from the request that noticed it, to the answer."""

    @property
    def num_kills(self) -> int:
        return self.kills.total()

    def __str__(self) -> str:
        moments = ", ".join(f"{count} {moment}" for moment, count in sorted(self.kills.items()))
        refused = ", ".join(f"{count} {why}" for why, count in sorted(self.refused.items()))
        answers = ", ".join(f"{count} by {devices}" for devices, count in sorted(self.answers.items(), reverse=True))
        found_s = sorted(self.recoveries_s) or [0.0]
        return (
            f"{self.num_kills} kills ({moments}); {self.answers.total()} right answers ({answers} devices), largest "
            f"error {self.largest_error:.1g}; {self.repeated} requests repeated, {self.failed_twice} failed twice; "
            f"rounds refused: {refused or 'none'}; "
            f"recovery median {statistics.median(found_s):.2f} s, slowest {found_s[-1]:.2f} s"
        )


def accept_servers(listener: socket.socket, num_devices: int) -> list[Connection]:
    """A connection to the server of each device, by rank."""
    servers: dict[int, Connection] = {}
    while len(servers) < num_devices:
        listener.settimeout(PATIENCE_S)
        server = Connection(listener.accept()[0].detach())
        assert server.poll(PATIENCE_S)
        servers[server.recv()] = server
    return [servers[rank] for rank in range(num_devices)]


def has_connection(pid: int) -> bool:
    """Whether the process has one over TCP, also in another network namespace."""
    files = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            files.add(os.readlink(path))
    connections = map(str.split, Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    return any(fields[3] == "01" and f"socket:[{fields[9]}]" in files for fields in connections)  # 01: established


class Processes:
    """One process on each device, which answer requests together. See ``started``."""

    def __init__(self, servers: Sequence[Connection], round_: Round) -> None:
        self.events: list[Event] = []
        """The leader's."""
        self.killed_s: dict[int, float] = {}
        self.ended: dict[int, int] = {}
        """Exit codes."""
        self.errors: dict[int, str] = {}
        self._servers, self._num_devices = servers, len(servers)
        for rank, server in enumerate(servers):
            server.send(replace(round_, rank=rank, num_devices=len(servers)))
        self.pids: dict[int, int] = {}

    def learn_pids(self) -> None:
        for rank in range(self._num_devices):
            event = self._hear(rank)
            assert event.kind == "started", event
            self.pids[rank] = event.what

    def wait_until_met(self) -> None:
        """Until each is connected to some other."""
        deadline_s = time.monotonic() + PATIENCE_S
        for pid in self.pids.values():
            while not has_connection(pid):
                assert time.monotonic() < deadline_s, f"they never meet: {self.story()}"
                time.sleep(0.002)

    def kill(self, rank: int) -> None:
        at_s = time.monotonic()
        with suppress(ProcessLookupError):  # it may have ended with an error; ``check`` knows when
            os.kill(self.pids[rank], signal.SIGKILL)
            self.killed_s[rank] = at_s

    def _hear(self, rank: int) -> Event:
        """What a device says next."""
        assert self._servers[rank].poll(PATIENCE_S), f"rank {rank} hangs: {self.story()}"
        event = self._servers[rank].recv()
        if rank == 0:
            self.events.append(event)
        if event.kind == "failed":
            self.errors[rank] = event.what
        if event.kind == "ended":
            self.ended[rank] = event.what
        return event

    def next(self, kind: str) -> Event | None:
        """The next of its kind that the leader says from now on; None: it has ended."""
        while 0 not in self.ended and self._servers[0].poll():
            self._hear(0)
        return self.following(kind)

    def following(self, kind: str) -> Event | None:
        """The next of its kind of those that were not heard yet; None: the leader has ended."""
        while 0 not in self.ended:
            event = self._hear(0)
            if event.kind == kind:
                return event
        return None

    def is_answered_again(self) -> bool:
        """Waits until a request has an answer that was asked after the last kill. False: the leader has ended."""
        last_s = max(self.killed_s.values())
        asked_s = 0.0
        while 0 not in self.ended:
            event = self._hear(0)
            if event.kind == "asked":
                asked_s = event.at_s
            if event.kind == "answered" and asked_s > last_s:
                return True
        return False

    def end(self) -> None:
        """Tells the leader to end, and waits until all have."""
        self._servers[0].send(None)
        for rank in range(self._num_devices):
            while rank not in self.ended:
                self._hear(rank)

    def kill_all(self) -> None:
        for rank, pid in self.pids.items():
            if rank not in self.ended:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for rank in self.pids:
            while rank not in self.ended:
                self._hear(rank)

    def story(self) -> str:
        """The last that happened, for errors."""
        start_s = self.events[0].at_s if self.events else 0.0
        kills = [Event("killed", at_s, rank) for rank, at_s in self.killed_s.items()]
        events = sorted([*self.events, *kills], key=lambda event: event.at_s)[-40:]
        lines = [f"{event.at_s - start_s:8.3f} {event.kind} {event.what or ''}" for event in events]
        return "\n".join(["", *lines, f"ended: {self.ended}", f"errors: {self.errors}"])

    # --- what came of it ----------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        found: list[Request] = []
        for kind, at_s, what in self.events:
            if kind == "asked":
                found.append(Request(asked_s=at_s))
            elif kind == "told" and found and (ranks := re.match(r"ranks? ([\d, ]+) lost; ", what)):
                found[-1].lost += map(int, ranks[1].split(", "))
            elif kind in ("answered", "failed") and found:
                found[-1].end_s = at_s
                if kind == "answered":
                    found[-1].error, found[-1].num_devices = what
        return found

    def check(self, tally: Tally, is_memory_short: bool = False) -> None:
        """Once all have ended: that the answers are right and all ended as they should; counts them."""
        requests, story, is_refused = self.requests(), self.story(), bool(self.ended[0])
        killed = {rank for rank in self.killed_s if self.ended[rank] == -signal.SIGKILL}
        assert killed == self.killed_s.keys() or is_refused, story
        self.killed_s = {rank: self.killed_s[rank] for rank in killed}
        lost = [rank for request in requests for rank in request.lost]
        assert len(lost) == len(set(lost)) and set(lost) <= self.killed_s.keys(), story
        assert "no device lost" not in story, story
        for request in requests:
            if request.error is not None:
                gone = sum(at_s < request.asked_s for at_s in self.killed_s.values())
                assert request.error <= ERROR and request.num_devices <= self._num_devices - gone, story
            elif not (is_refused and request is requests[-1]):
                assert len(request.lost) > 1, story  # repeated once, and lost another one
                tally.failed_twice += 1
        if is_refused:
            self._check_refused(bool(requests), is_memory_short)
            tally.refused["memory" if is_memory_short else "joining"] += 1
        else:
            assert not is_memory_short and requests, story
            assert not any(self.ended[rank] for rank in self.ended.keys() - self.killed_s.keys()), story
        self._count(tally, requests)

    def _check_refused(self, has_begun: bool, is_memory_short: bool) -> None:
        story = self.story()
        ranks = ", ".join(map(str, sorted(self.killed_s)))
        for rank in self.ended.keys() - self.killed_s.keys():
            if is_memory_short:
                wanted = r"ranks? [\d, ]+ lost, and without it: memory: .*rank \d needs [\d.]+ MiB and has [\d.]+"
                assert self.ended[rank] == 2 and re.search(wanted, self.errors[rank]), story
            else:
                assert not has_begun and self.ended[rank] == 3, story
                assert re.search(rf"ranks? {ranks}\b", self.errors[rank]), story

    def _count(self, tally: Tally, requests: Sequence[Request]) -> None:
        answered = [request for request in requests if request.error is not None]
        tally.answers.update(request.num_devices for request in answered)
        tally.largest_error = max([tally.largest_error, *(request.error or 0.0 for request in answered)])
        tally.repeated += sum(bool(request.lost) for request in requests)
        for request in answered:
            if request.lost:
                first_s = min(self.killed_s[rank] for rank in request.lost)
                tally.recoveries_s.append(request.end_s - max(request.asked_s, first_s))
        for rank, at_s in self.killed_s.items():
            tally.kills[self._moment(rank, at_s, requests)] += 1

    def _moment(self, rank: int, at_s: float, requests: Sequence[Request]) -> str:
        if not requests or at_s < requests[0].asked_s:
            return "joining"
        if not any(request.asked_s <= at_s < request.end_s for request in requests):
            return "between"
        noticed_s = {rank: request.end_s for request in requests for rank in request.lost}
        others = self.killed_s.items() - {(rank, at_s)}
        is_recovering = any(killed_s < at_s < noticed_s.get(other, 0.0) for other, killed_s in others)
        return "recovery" if is_recovering else "request"


@contextmanager
def started(servers: Sequence[Connection], round_: Round) -> Iterator[Processes]:
    """Processes of one round, none of which is left at the end, whatever happens."""
    processes = Processes(servers, round_)
    try:
        processes.learn_pids()
        yield processes
    finally:
        processes.kill_all()


def kill_one_by_one(processes: Processes, random_: random.Random, most: int) -> None:
    """Kills so many devices but not the leader, in any order: between requests, in a request, or while the others
    recover. Ends where the leader does."""
    left = random_.sample(range(1, len(processes.pids)), most)
    while left:
        if random_.random() < 0.4:
            event = processes.next("answered")
            time.sleep(random_.uniform(0, 0.005))
        else:
            before = [request.end_s - request.asked_s for request in processes.requests()[:-1]]
            usual_s = statistics.median(before) if before else 0.1
            event = processes.next("asked")
            time.sleep(random_.uniform(0, usual_s))
        if event is None:
            return
        processes.kill(left.pop())
        while left and random_.random() < 0.45:
            time.sleep(random_.uniform(0, random_.choice((0.0, 0.03, 0.1, 0.5))))
            processes.kill(left.pop())
        if not processes.is_answered_again():
            return


@contextmanager
def listening(directory: Path) -> Iterator[socket.socket]:
    """Where servers connect to: ``directory / "servers"``, which is gone afterwards."""
    place = directory / "servers"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        try:
            yield listener
        finally:
            place.unlink()
