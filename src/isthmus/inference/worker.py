"""``isthmus worker``: a device that waits to be invited.

Each session runs in a process of its own, so that what a model took is given back, and one that fails takes nobody with
it.
"""

from __future__ import annotations

import multiprocessing
import selectors
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from isthmus.inference.joining import Invitation, accept, read_invitation
from isthmus.inference.planned import join
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.shards import ShardReader
from isthmus.spec.errors import IsthmusError
from isthmus.transport.rendezvous import listen, receive_frame, send_frame

_FRAME_S = 5.0
"""A caller that has not said what it wants by then is dropped."""
_STOP_S = 5.0


class Worker:
    """Serves one leader at a time; others are told that it is busy. Use it as a context manager."""

    def __init__(
        self, address: str, port: int, *, model: Path | None = None, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        """Listens at ``address`` only. ``model``: where this device has the model, whatever name the leader uses for
        it; the two must be the same (their digests are compared). ``tell`` gets a line for everything that happens.
        """
        self._model = model
        self._tell = tell
        self._listener = listen(address, port)
        self.address, self.port = self._listener.getsockname()[:2]
        self._session: BaseProcess | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening, and ends a session that runs."""
        self._listener.close()
        if self._session is not None:
            self._session.terminate()
            self._session.join(_STOP_S)
            if self._session.is_alive():
                self._session.kill()
                self._session.join()
            self._session = None

    def serve(self) -> None:
        """Blocks for good; an exception from outside (Ctrl-C) ends it."""
        self._tell(f"waiting at {self.address}:{self.port}")
        while True:
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                if self._session is not None:
                    selector.register(self._session.sentinel, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select()]
            if self._session is not None and self._session.sentinel in ready:
                self._session.join()
                code = self._session.exitcode
                self._tell("session ended" if code == 0 else f"session failed with exit code {code}")
                self._session = None
            if self._listener in ready:
                self._answer()

    def _answer(self) -> None:
        connection, (caller, *_) = self._listener.accept()
        with connection:
            try:
                invitation = read_invitation(receive_frame(connection, time.monotonic() + _FRAME_S))
                send_frame(connection, self._begin(invitation, caller))
            except (OSError, ValueError) as error:
                self._tell(f"{caller}: no invitation ({error})")

    def _begin(self, invitation: Invitation, caller: str) -> dict[str, str]:
        """What the leader is answered. On success the session runs."""
        if self._session is not None:
            return {"error": "it is busy with another leader"}
        try:
            directory = resolve_checkpoint(self._model or invitation.model)
            digest = ShardReader(directory).digest()
        except (ValueError, OSError) as error:
            return {"error": str(error)}
        if digest != invitation.digest:
            return {"error": f"{directory} there is another model ({digest}) than the leader's ({invitation.digest})"}
        self._tell(f"{caller}: rank {invitation.rank} of {invitation.world_size}, {invitation.model}")
        context = multiprocessing.get_context("spawn")
        self._session = context.Process(target=_follow, args=(str(directory), invitation), name="isthmus-session")
        self._session.start()
        return {}


def _follow(directory: str, invitation: Invitation) -> None:
    """One session, in its own process."""
    try:
        with accept(invitation) as group:
            with join(ShardReader(Path(directory)), invitation.wish, group) as engine:
                engine.follow()
    except IsthmusError as error:
        raise SystemExit(f"error: {error}") from error
