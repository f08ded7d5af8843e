"""What an exchange costs on links of some latency and bandwidth, and which algorithm is the fastest.

A model of a switched network: every device sends and receives at once at ``bytes_per_s``, an exchange takes
``latency_s`` before the first byte is there, and each message costs its sender and receiver ``message_s`` of their own
CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AllReduceAlgorithm = Literal["mesh", "two_step", "ring"]
AllGatherAlgorithm = Literal["mesh", "ring"]


@dataclass(frozen=True, kw_only=True)
class CollectiveCosts:
    """Seconds of exchanges among ``world_size`` devices. Bytes are those on the wire, after encoding."""

    world_size: int
    latency_s: float
    bytes_per_s: float
    message_s: float = 0.0

    def all_gather_s(self, num_bytes: int, algorithm: AllGatherAlgorithm = "mesh") -> float:
        """``num_bytes`` of each rank come to every other one."""
        num_peers = self.world_size - 1
        if algorithm == "mesh":
            return self._exchange_s(num_peers, num_peers * num_bytes)
        return num_peers * self._exchange_s(1, num_bytes)

    def reduce_scatter_s(self, num_bytes: int, algorithm: AllGatherAlgorithm = "mesh") -> float:
        """Every rank ends with its share of the sum of ``num_bytes``; sends are those of an all-gather of a share."""
        return self.all_gather_s(-(-num_bytes // self.world_size), algorithm)

    def all_reduce_s(self, num_bytes: int, algorithm: AllReduceAlgorithm = "mesh") -> float:
        """Every rank ends with the sum of ``num_bytes``."""
        if algorithm == "mesh":
            return self.all_gather_s(num_bytes)
        part = "mesh" if algorithm == "two_step" else "ring"
        return self.reduce_scatter_s(num_bytes, part) + self.all_gather_s(-(-num_bytes // self.world_size), part)

    def best_all_reduce(self, num_bytes: int) -> Literal["mesh", "two_step"]:
        """The algorithm with the least ``all_reduce_s``: ``mesh`` for small messages, ``two_step`` for large ones.

        A ring sends what ``two_step`` sends in more exchanges: in this model it is never faster.
        """
        is_small = self.all_reduce_s(num_bytes, "mesh") <= self.all_reduce_s(num_bytes, "two_step")
        return "mesh" if is_small else "two_step"

    def _exchange_s(self, num_messages: int, sent_bytes: int) -> float:
        if num_messages == 0:
            return 0.0
        return self.latency_s + 2 * num_messages * self.message_s + sent_bytes / self.bytes_per_s
