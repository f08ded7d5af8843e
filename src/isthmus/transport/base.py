"""The transport seam: a ``Group`` of ranks that exchange tensors.

Tensors are contiguous and on the CPU, of float32, bfloat16, int64, int8 or uint8, and taken as flat: ranks must agree
on numbers of values and dtypes, not on shapes. Results go into tensors that the caller supplies, so a steady state
allocates nothing. Uneven shares are lists of tensors, one per rank, which may be empty; ``whole.split(sizes)`` makes
them.

Every rank of a group makes the same calls in the same order: that alone says what belongs together. A call that does
not match raises ``MismatchError``, a peer that is gone or from which nothing comes for ``timeout_s`` raises
``PeerLostError``, on every rank that waits for it, directly or through others. After either the group can only be
closed. The time limit counts while a call waits; between calls a rank may compute as long as it likes, as long as
nobody waits for it that long.

Groups do not see each other's messages and can be used at the same time by different threads. One group is for one
thread at a time.
"""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.transport import collectives
from isthmus.transport.buffers import bytes_of
from isthmus.transport.endpoint import Endpoint
from isthmus.transport.errors import TransportError
from isthmus.transport.messages import DTYPE_FORMATS, Operation
from isthmus.transport.repeated import PlainSum, RepeatedSum

Algorithm = Literal["mesh", "two_step", "ring", "doubling"]


class Handle:
    """A call that was started and may still run."""

    def __init__(self, future: concurrent.futures.Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Blocks until the call has ended, and raises what it raised."""
        self._future.result()

    def is_done(self) -> bool:
        return self._future.done()


class Group(Endpoint):
    """Ranks ``0 … world_size − 1`` that exchange tensors. A context manager; leaving it closes the group."""

    def __init__(self, *, rank: int, world_size: int, timeout_s: float, global_ranks: tuple[int, ...]) -> None:
        super().__init__(rank=rank, world_size=world_size, timeout_s=timeout_s, global_ranks=global_ranks)
        self._in_use = threading.Lock()
        self._progress: concurrent.futures.ThreadPoolExecutor | None = None
        self._progress_ident = 0
        self._last_started: concurrent.futures.Future[None] | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def subgroup(self, ranks: Sequence[int]) -> Group:
        """A group of its own of ``ranks`` (of this group, ascending), with its own connections. Called by those ranks
        only, all of them; blocks until they have met. It is closed by itself. Raises ``IsthmusError`` for ranks that
        are not such."""

    def close(self) -> None:
        """Leaves the group. Calls that still run, here or at a peer that waits for this rank, raise. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._hang_up(())
            if self._progress is not None:
                self._progress.shutdown(cancel_futures=True)

    # --- asynchronous calls -------------------------------------------------------------------------------------------

    def start(self, call: Callable[..., None], /, *arguments: Any, **options: Any) -> Handle:
        """Starts ``call`` (a method of this group, or any function that calls some) on the group's own thread and
        returns at once: ``handle = group.start(group.all_reduce, x, codec="int8")``.

        Started calls run one after the other in the order of ``start``; a blocking call waits for those before it.
        Tensors must not be touched before ``wait()`` has returned.
        """
        if self._is_closed:
            raise TransportError("the group is closed: connect again")
        if self._progress is None:
            self._progress = concurrent.futures.ThreadPoolExecutor(1, "isthmus-transport", self._enter_progress_thread)
        self._last_started = self._progress.submit(call, *arguments, **options)
        return Handle(self._last_started)

    def _enter_progress_thread(self) -> None:
        self._progress_ident = threading.get_ident()
        # A new thread's first operator resets the number of threads for all, unless somebody asked for it before.
        torch.get_num_threads()

    def _run(self, call: Callable[..., None], *arguments: Any) -> None:
        """Runs a collective after all that was started before it."""
        if self._last_started is not None and threading.get_ident() != self._progress_ident:
            concurrent.futures.wait([self._last_started])
            self._last_started = None
        if self._is_closed:
            raise TransportError("the group is closed: connect again")
        if not self._in_use.acquire(blocking=False):
            raise TransportError("two threads call one group at once: use start, or a subgroup for each")
        try:
            if torch.is_inference_mode_enabled():  # which may write to any tensor; entering it again takes time
                call(self, *arguments)
            else:
                with torch.inference_mode():
                    call(self, *arguments)
        finally:
            self._in_use.release()

    # --- collectives --------------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, *, root: int = 0, codec: str | None = None) -> None:
        """Overwrites ``tensor`` on every rank with ``root``'s. With a codec, root's own too: with what the others
        decode."""
        self._check_rank("root", root)
        self._check_tensors(tensor)
        self._run(collectives.broadcast, tensor, root, codec)

    def gather(
        self, outputs: Sequence[Tensor] | None, tensor: Tensor, *, root: int = 0, codec: str | None = None
    ) -> None:
        """Writes rank r's ``tensor`` to ``outputs[r]`` on ``root``; the others give None. Sizes may differ between
        ranks."""
        self._check_rank("root", root)
        self._check_tensors(tensor)
        if self.rank == root:
            self._check_shares("outputs", outputs or (), tensor)
        self._run(collectives.gather, outputs, tensor, root, codec)

    def all_gather(
        self, outputs: Sequence[Tensor], tensor: Tensor, *, codec: str | None = None, algorithm: Algorithm = "mesh"
    ) -> None:
        """Writes rank r's ``tensor`` to ``outputs[r]`` on every rank. Sizes may differ between ranks. ``outputs[rank]``
        may be ``tensor``.

        A codec encodes each value once; ``outputs[rank]`` gets the decoded values like all others. ``algorithm``:
        ``mesh`` sends to all peers at once, ``ring`` to the next rank, N − 1 times.
        """
        self._check_algorithm(algorithm, ("mesh", "ring"))
        self._check_tensors(tensor)
        self._check_shares("outputs", outputs, tensor)
        self._run(collectives.all_gather, outputs, tensor, codec, algorithm)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], *, codec: str | None = None, algorithm: Algorithm = "mesh"
    ) -> None:
        """Writes to ``output`` the sum over ranks of their ``inputs[rank]``; sizes may differ between shares.

        float32 and bfloat16 are summed in FP32 in the order of ranks (``ring``: from rank + 1 on, without a codec),
        int64 exactly.
        """
        self._check_algorithm(algorithm, ("mesh", "ring"), codec)
        self._check_tensors(output)
        collectives.check_summable(output)
        self._check_shares("inputs", inputs, output)
        self._run(collectives.reduce_scatter, output, inputs, codec, algorithm)

    def all_reduce(self, tensor: Tensor, *, codec: str | None = None, algorithm: Algorithm = "mesh") -> None:
        """Replaces ``tensor`` by its sum over all ranks, the same bits on each. Sums as ``reduce_scatter`` does.

        ``algorithm``: ``mesh`` sends everything to everybody, one exchange (small messages); ``two_step`` a
        reduce-scatter and an all-gather, one exchange each, 2 (N − 1) / N of the tensor sent (large ones; a codec
        rounds twice); ``ring`` the same bytes in 2 (N − 1) exchanges between neighbours; ``doubling`` everything to one
        peer in each of log2 N exchanges, for N a power of two (the fewest messages, and fewer bytes than ``mesh``; a
        codec rounds in each), summed in pairs, not for bfloat16, which it would round in between.
        """
        self._check_algorithm(algorithm, collectives.ALGORITHMS, codec)
        self._check_tensors(tensor)
        if algorithm == "doubling":
            self._check_doubling(tensor)
        collectives.check_summable(tensor)
        self._run(collectives.all_reduce, tensor, codec, algorithm)

    def repeated_sum(self, num_values: int) -> RepeatedSum:
        """A sum of so many FP32 values that will be asked for often: the same bits and messages as ``all_reduce`` with
        ``doubling``, or ``mesh`` where ranks are no power of two, in less time."""
        is_power_of_two = not self.world_size & (self.world_size - 1)
        algorithm: Algorithm = "doubling" if is_power_of_two else "mesh"
        return PlainSum(num_values, functools.partial(self.all_reduce, algorithm=algorithm))

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, codec: str | None = None) -> None:
        """Writes rank r's ``inputs[rank]`` to ``outputs[r]``. Sizes may differ between any two ranks. With a codec,
        what stays here is encoded and decoded like the rest."""
        if not inputs:
            raise IsthmusError(f"inputs: got none, wanted {self.world_size} tensors, one for each rank")
        self._check_shares("inputs", inputs, None)
        self._check_shares("outputs", outputs, None)
        if outputs[self.rank].numel() != inputs[self.rank].numel():
            raise IsthmusError(
                f"outputs[{self.rank}]: what stays has {inputs[self.rank].numel()} values: make room for them"
            )
        self._run(collectives.all_to_all, outputs, inputs, codec)

    # --- between two ranks --------------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, to: int, *, tag: int = 0) -> None:
        """Sends ``tensor`` to rank ``to``, which calls ``recv`` with the same tag (0 … 65535). Blocks until the network
        has taken it all, which a large tensor reaches only while it is received: two ranks that send to each other use
        ``all_to_all`` or ``start``."""
        self._check_peer("to", to, tag)
        self._check_tensors(tensor)
        self._run(_send, tensor, to, tag)

    def recv(self, tensor: Tensor, source: int, *, tag: int = 0) -> None:
        """Overwrites ``tensor`` with what rank ``source`` sends."""
        self._check_peer("source", source, tag)
        self._check_tensors(tensor)
        self._run(_recv, tensor, source, tag)

    def await_message(self, source: int) -> None:
        """Blocks until something comes from rank ``source`` (or it is gone), without a time limit: for a rank that
        waits to be asked. The call that follows receives it. A transport that cannot tell returns at once."""

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _check_tensors(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if (
                not tensor.is_contiguous()
                or not tensor.is_cpu
                or tensor.dtype not in DTYPE_FORMATS
                or tensor.requires_grad
            ):
                raise IsthmusError(
                    f"tensor: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}, "
                    f"requires_grad {tensor.requires_grad}; wanted a contiguous CPU tensor without gradient of "
                    f"{', '.join(str(dtype) for dtype in DTYPE_FORMATS)}: use contiguous(), cpu(), detach()"
                )

    def _check_shares(self, name: str, shares: Sequence[Tensor], own: Tensor | None) -> None:
        """One tensor per rank, of one dtype, and this rank's as large as ``own``."""
        if len(shares) != self.world_size:
            raise IsthmusError(f"{name}: got {len(shares)} tensors, wanted {self.world_size}, one for each rank")
        self._check_tensors(*shares)
        dtypes = {share.dtype for share in shares} | ({own.dtype} if own is not None else set())
        if len(dtypes) > 1:
            raise IsthmusError(f"{name}: got {', '.join(sorted(map(str, dtypes)))} in one call, wanted one dtype")
        if own is not None and shares[self.rank].numel() != own.numel():
            raise IsthmusError(
                f"{name}[{self.rank}]: got {shares[self.rank].numel()} values, wanted this rank's {own.numel()}"
            )

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise IsthmusError(f"{name}: got rank {rank}, wanted 0 … {self.world_size - 1}")

    def _check_peer(self, name: str, rank: int, tag: int) -> None:
        self._check_rank(name, rank)
        if rank == self.rank:
            raise IsthmusError(f"{name}: got this rank itself ({rank}), wanted another")
        if not 0 <= tag < 1 << 16:
            raise IsthmusError(f"tag: got {tag}, wanted 0 … 65535")

    def _check_algorithm(self, algorithm: str, known: Sequence[str], summed_codec: str | None = None) -> None:
        if algorithm not in known:
            raise IsthmusError(f"algorithm: got {algorithm!r}, wanted one of {', '.join(known)}")
        if algorithm == "ring" and summed_codec is not None:
            raise IsthmusError(
                f"codec: got {summed_codec!r} with a ring, which would round sums once per hop: use algorithm "
                "mesh or two_step"
            )

    def _check_doubling(self, tensor: Tensor) -> None:
        if self.world_size & (self.world_size - 1) or tensor.dtype == torch.bfloat16:
            raise IsthmusError(
                f"algorithm: got 'doubling' for {self.world_size} ranks and {tensor.dtype}, wanted a power of two and "
                "no bfloat16: use mesh"
            )

    def _check_members(self, ranks: Sequence[int]) -> tuple[int, ...]:
        members = tuple(ranks)
        if list(members) != sorted(set(members)) or not set(members) <= set(range(self.world_size)):
            raise IsthmusError(f"ranks: got {members}, wanted ascending ranks below {self.world_size}, each once")
        if self.rank not in members:
            raise IsthmusError(f"ranks: got {members} on rank {self.rank}: only members call subgroup")
        return members


def _send(end: Endpoint, tensor: Tensor, to: int, tag: int) -> None:
    end.transfer(end.begin_call(Operation.SEND, DTYPE_FORMATS[tensor.dtype], tag), [(to, bytes_of(tensor))], [])


def _recv(end: Endpoint, tensor: Tensor, source: int, tag: int) -> None:
    end.transfer(end.begin_call(Operation.SEND, DTYPE_FORMATS[tensor.dtype], tag), [], [(source, bytes_of(tensor))])
