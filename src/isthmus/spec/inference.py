"""How a request is to be computed: which devices, which strategy, what goes on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.spec.errors import IsthmusError

STRATEGIES = ("single", "tensor", "sequence", "pipeline", "block")
CODECS = ("fp32", "bf16", "int8", "int4")
DTYPES = ("fp32", "bf16", "int8")
ORIGINAL_PLANS = ("gather", "tokens", "sequence", "tensor", "fastest")
"""How an original layer of a decoupled model is computed once slices are to meet. ``gather``: every device gathers all
and computes all of it. ``tokens``: gathers all, and computes keys and values of all tokens and the rest of its own.
``sequence``: gets its tokens, and gathers keys and values. ``tensor``: gathers all, and computes its heads and columns.
``fastest``: one device gathers all, computes, and gives each its slices."""
GENERATING = ("gather", "tensor")
"""Those that leave all of the last token on every device."""
ALGORITHMS = ("mesh", "two_step", "ring", "doubling", "scatter")


@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """What is asked: ``batch`` sequences of ``num_tokens``, to be continued by ``num_new_tokens`` each."""

    schema_version: int = 1
    num_tokens: int
    batch: int = 1
    num_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.num_new_tokens < 0:
            raise IsthmusError(f"num_new_tokens: got {self.num_new_tokens}, wanted 0 or more")
        if self.num_tokens < 1 or self.batch < 1:
            raise IsthmusError(
                f"tokens, batch: got {self.num_tokens}, {self.batch}, wanted at least one token and one sequence"
            )


@dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """One choice. ``devices`` are ranks, ascending; the first leads: it reads requests and gives answers."""

    schema_version: int = 1
    strategy: str
    """``single``, ``tensor`` (heads and columns divided), ``sequence`` (tokens divided), ``pipeline`` (layers) or, for
    decoupled models, ``block`` (sub-blocks)."""
    devices: tuple[int, ...]
    weights: tuple[float, ...]
    """Each device's part of the work; any scale."""
    codec: str = "fp32"
    """What is sent in, unless ``codecs`` says more."""
    dtype: str = "fp32"
    """What matrices are kept and multiplied in."""
    algorithm: Literal["mesh", "two_step", "ring", "doubling", "scatter"] = "two_step"
    """Of all-reduces. ``scatter``: none, each sum goes to the device that keeps the token."""
    originals: tuple[str, ...] = ()
    """With ``block``: one of ``ORIGINAL_PLANS`` for each original layer, in order; empty: ``gather`` for all."""
    codecs: tuple[str, ...] = ()
    """With ``block``: for each original layer, in order, what all exchanges that it brings about are in: before it, in
    it, and the one that brings its result back to slices or, after the last, to the whole; and those of devices that
    share a sub-block until the next one (before the first one: as the first one's). Empty: ``codec`` for all; where all
    are alike it becomes that."""
    overlaps: bool = False
    """With ``block``: what is exchanged between layers goes in two portions of the tokens. The first is on its way
    while the second one's MLP is computed, the second while queries, keys and values of the first are."""

    def __post_init__(self) -> None:
        choices = (("strategy", STRATEGIES), ("codec", CODECS), ("dtype", DTYPES), ("algorithm", ALGORITHMS))
        for each in self.originals:
            if each not in ORIGINAL_PLANS:
                raise ValueError(f"originals: got {each!r}, wanted one of {', '.join(ORIGINAL_PLANS)}")
        for each in self.codecs:
            if each not in CODECS:
                raise ValueError(f"codecs: got {each!r}, wanted one of {', '.join(CODECS)}")
        if self.codecs and self.strategy != "block":
            raise ValueError(
                f"codecs: got {len(self.codecs)} for strategy {self.strategy!r}, wanted none; name one codec"
            )
        if self.overlaps and self.strategy != "block":
            raise ValueError(f"overlaps: got true for strategy {self.strategy!r}, wanted false; it is for block")
        if len(set(self.codecs)) == 1:  # one plan has one form
            object.__setattr__(self, "codec", self.codecs[0])
            object.__setattr__(self, "codecs", ())
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(known)}")
        if not self.devices or list(self.devices) != sorted(set(self.devices)):
            raise ValueError(f"devices: got {self.devices}, wanted ascending ranks, each once")
        if len(self.weights) != len(self.devices):
            raise ValueError(f"weights: got {len(self.weights)}, wanted {len(self.devices)}, one for each device")
        if self.strategy == "single" and len(self.devices) != 1:
            raise ValueError(f"devices: got {self.devices} for strategy 'single', wanted one")

    @property
    def way(self) -> str:
        """What sets it apart from other plans of its strategy: how tensor parallelism sums, or how original layers of a
        decoupled model are computed."""
        if self.strategy == "tensor":
            return self.algorithm
        ways = "+".join(dict.fromkeys(self.originals)) if self.strategy == "block" else ""
        return f"{ways} overlapped".strip() if self.overlaps else ways

    @property
    def wire(self) -> str:
        """What is sent in, in short."""
        return "+".join(dict.fromkeys(self.codecs)) or self.codec

    @staticmethod
    def even(strategy: str, num_devices: int, *, codec: str = "fp32", dtype: str = "fp32") -> InferencePlan:
        """All of ``num_devices`` alike; one of them is ``single`` whatever was asked for."""
        return InferencePlan(
            strategy="single" if num_devices == 1 else strategy,
            devices=tuple(range(num_devices)),
            weights=(1.0,) * num_devices,
            codec=codec,
            dtype=dtype,
        )
