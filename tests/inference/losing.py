"""Processes of devices for the tests that kill some.

``serve`` runs on a device all the time. It has imported everything, and forks the process of the device, which takes
part until it is told to end, or is killed: then another one is forked for the next round.
"""

from __future__ import annotations

import gc
import multiprocessing.connection
import os
import random
import signal
import socket
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from isthmus.inference.engine import Engine
from isthmus.inference.run import open_engine
from isthmus.models.decoupled import architectures
from isthmus.profiling.limits import free_memory_bytes
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferenceRequest
from isthmus.transport.errors import PeerLostError

assert architectures.CLASSES  # imported before anything is forked: it takes longest
Connection = multiprocessing.connection.Connection
LONGEST_S = 400
"""A process of a device ends by then, whatever it waits for and whoever should have ended it."""
MOST_PAUSE_S = 0.03


class Event(NamedTuple):
    """What a device says."""

    kind: str
    """``started``, ``asked``, ``told``, ``answered``, ``failed`` or ``ended``."""
    at_s: float
    """By the clock that all processes of a host share."""
    what: Any = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request. ``settings``: asks for tokens, else for hidden states (or ``is_mean``, their mean)."""

    ids_BT: list[list[int]]
    attended_BT: list[list[int]]
    settings: GenerationSettings | None = None
    is_mean: bool = False
    wanted: Any = None
    """One device's answer."""

    def ask(self, engine: Engine) -> torch.Tensor:
        ids_BT, attended_BT = torch.tensor(self.ids_BT), torch.tensor(self.attended_BT).bool()
        if self.settings is not None:
            return engine.generate_tokens(ids_BT, attended_BT, self.settings)
        if self.is_mean:
            return engine.mean(ids_BT, attended_BT)
        return engine.hidden(ids_BT, attended_BT) * attended_BT[..., None]

    def answered_by(self, engine: Engine) -> Question:
        return replace(self, wanted=self.ask(engine).numpy())

    def error_of(self, found: torch.Tensor) -> float:
        """Relative; infinite for other tokens."""
        wanted = torch.from_numpy(self.wanted)
        if self.settings is not None:
            return 0.0 if torch.equal(found, wanted) else float("inf")
        return float((found - wanted).norm() / wanted.norm())


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the processes of one round are to do."""

    rank: int = 0
    num_devices: int
    address: str
    port: int
    model: str
    strategy: str
    questions: tuple[Question, ...]
    """They are asked in turns."""
    timeout_s: float
    refresh: bool = False
    free_bytes: int | None = None
    """Each device has so much memory left; None: what there is."""
    seed: int = 0


def serve(path: str, num_devices: int) -> None:
    """Plays the device RANK, or with several all of them, each in a process. Until nobody listens at ``path``."""
    torch.set_num_threads(1)
    if num_devices == 1:
        return _serve(path, int(os.environ["RANK"]))
    children = []
    for rank in range(num_devices):
        if not (pid := os.fork()):
            _serve(path, rank)
            os._exit(0)  # what was imported needs no end
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def _serve(path: str, rank: int) -> None:
    with socket.socket(socket.AF_UNIX) as connecting:
        connecting.connect(path)
        connection = Connection(connecting.detach())
    connection.send(rank)
    while True:
        try:
            told = connection.recv()
        except (EOFError, ConnectionError):
            return
        if not isinstance(told, Round):
            continue  # the end of a round that had ended before
        pid = os.fork()
        if not pid:
            os._exit(_take_part(connection, told))
        _, status = os.waitpid(pid, 0)
        connection.send(Event("ended", time.monotonic(), os.waitstatus_to_exitcode(status)))


def _take_part(connection: Connection, round_: Round) -> int:
    """One round, in a process of its own. Returns the exit code that the command line would."""
    signal.alarm(LONGEST_S)

    def say(kind: str, what: object = None) -> None:
        connection.send(Event(kind, time.monotonic(), what))

    say("started", os.getpid())
    os.environ |= {
        "RANK": str(round_.rank),
        "WORLD_SIZE": str(round_.num_devices),
        "MASTER_ADDR": round_.address,
        "MASTER_PORT": str(round_.port),
    }
    first = round_.questions[0]
    request = InferenceRequest(
        num_tokens=len(first.ids_BT[0]),
        batch=len(first.ids_BT),
        num_new_tokens=first.settings.max_new_tokens if first.settings else 0,
    )
    taken = b"" if round_.free_bytes is None else _take_all_but(round_.free_bytes)
    try:
        with open_engine(
            round_.model,
            strategy=round_.strategy,
            request=request,
            refresh=round_.refresh,
            timeout_s=round_.timeout_s,
            tell=lambda text: say("told", text),
        ) as engine:
            if engine.is_leader:
                _lead(engine, connection, round_, say)
            else:
                engine.follow()
    except IsthmusError as error:
        say("failed", str(error))
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        del taken
    return 0


def _take_all_but(num_bytes: int) -> bytes:
    """Memory, until so much is left to this process."""
    gc.collect()  # which writes to every object: from now on this process shares few pages with the server
    return b"\1" * max(0, free_memory_bytes() - num_bytes)


def _lead(engine: Engine, connection: Connection, round_: Round, say: Any) -> None:
    random_ = random.Random(round_.seed)
    number = 0
    while not connection.poll(random_.choice((0.0, random_.uniform(0, MOST_PAUSE_S)))):
        question = round_.questions[number % len(round_.questions)]
        number += 1
        say("asked")
        try:
            found = question.ask(engine)
        except PeerLostError as error:
            say("failed", str(error))
        else:
            say("answered", (question.error_of(found), len(engine.plan.devices)))
    connection.recv()
