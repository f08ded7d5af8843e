"""A sum that is asked for thousands of times: what can be known beforehand is prepared once.

A token takes two sums a layer of a few kilobytes each. On weak devices the interpreter's way through the general call
takes more time than the kernel's. MPI calls such a thing a persistent collective.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from isthmus.transport import native_sums
from isthmus.transport.buffers import bytes_of
from isthmus.transport.collectives import ALGORITHMS
from isthmus.transport.endpoint import Endpoint
from isthmus.transport.messages import DTYPE_FORMATS, HEADER_BYTES, Operation, complete_header

_TAG = ALGORITHMS.index("doubling")
_PREFIX_BYTES = 8

Exchange = Callable[[int, bytes, memoryview, memoryview, int, int], None]
"""Sends a whole message to a peer and receives one with the same header, of each of which so many bytes are done."""


class RepeatedSum(ABC):
    """Calling it replaces ``values`` (FP32, flat) by their sum over all ranks, as ``Group.all_reduce`` does; all ranks
    call it. Blocks; raises what ``all_reduce`` raises. Made by ``Group.repeated_sum``."""

    values: Tensor

    @abstractmethod
    def __call__(self) -> None: ...


class PlainSum(RepeatedSum):
    """By the general call."""

    def __init__(self, num_values: int, all_reduce: Callable[[Tensor], None]) -> None:
        self.values = torch.zeros(num_values)
        self._all_reduce = all_reduce

    def __call__(self) -> None:
        self._all_reduce(self.values)


class DoublingSum(RepeatedSum):
    """Recursive doubling with the messages of the general call, each in one piece of memory with its header.

    ``sums.c`` does it, where it can be had, and leaves to Python whatever does not go smoothly.
    """

    def __init__(
        self,
        end: Endpoint,
        num_values: int,
        *,
        run: Callable[[Callable[[Endpoint], None]], None],
        exchange: Exchange,
        sockets: Mapping[int, int],
        silent: Callable[[list[int]], BaseException],
    ) -> None:
        """``run`` is the group's way of running a collective, ``sockets`` the descriptor of each peer's, ``silent`` the
        error for peers from which nothing comes."""
        self.values, self._outgoing = _message(num_values)
        self._received, self._incoming = _message(num_values)
        self._run, self._exchange, self._silent = run, exchange, silent
        self._peers = [end.rank ^ 1 << step for step in range(end.world_size.bit_length() - 1)]
        self._format = DTYPE_FORMATS[torch.float32]
        self._outgoing[:HEADER_BYTES] = complete_header(bytes(_PREFIX_BYTES), 4 * num_values)
        self._native = native_sums.add_up()
        self._sockets = torch.tensor([sockets[peer] for peer in self._peers], dtype=torch.int32)
        self._state = native_sums.CSum(
            sockets=self._sockets.data_ptr(),
            outgoing=self.values.data_ptr() - HEADER_BYTES,
            incoming=self._received.data_ptr() - HEADER_BYTES,
            num_steps=len(self._peers),
            num_bytes=len(self._outgoing),
            header_bytes=HEADER_BYTES,
        )
        self._state_pointer = ctypes.pointer(self._state)

    def __call__(self) -> None:
        self._run(self._add_up)

    def _add_up(self, end: Endpoint) -> None:
        prefix = self._outgoing[:_PREFIX_BYTES] = end.begin_call(Operation.ALL_REDUCE, self._format, _TAG)
        start_s = end.begin_exchange()
        try:
            self._exchange_all(prefix)
        except BaseException as error:
            end.fail(error)
            raise
        num_bytes = len(self._peers) * len(self._outgoing)
        end.end_exchange(start_s, len(self._peers), num_bytes, num_bytes)

    def _exchange_all(self, prefix: bytes) -> None:
        state = self._state
        state.step = state.sent = state.received = 0
        while state.step < len(self._peers):
            outcome = native_sums.OTHER if self._native is None else self._native(self._state_pointer)
            if outcome == native_sums.SILENT:
                raise self._silent([self._peers[state.step]])
            if outcome == native_sums.OTHER:  # the plain way does this step, or tells what is wrong
                peer = self._peers[state.step]
                self._exchange(peer, prefix, self._outgoing, self._incoming, state.sent, state.received)
                self.values.add_(self._received)
                state.step, state.sent, state.received = state.step + 1, 0, 0


def _message(num_values: int) -> tuple[Tensor, memoryview]:
    """Room for values, and for a header before them: the values, and the bytes of both."""
    room = torch.zeros(HEADER_BYTES // 4 + num_values)
    return room[HEADER_BYTES // 4 :], bytes_of(room)
