"""Answers one request under several plans in turns, so that noise of the machine meets all alike, and notes when.

The leader's clock counts from asking to having the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from isthmus.inference.engine import Engine
from isthmus.inference.layer import Layer
from isthmus.models.shards import ShardReader
from isthmus.planning.pieces import Piece, held_bytes, pieces_of
from isthmus.profiling.limits import free_memory_bytes
from isthmus.profiling.network import start
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.transport.base import Group

_WARM_UPS = 2
_WARM_UP_TOKENS = 8


@dataclass(kw_only=True)
class Timed:
    """What was seen of one plan, on the leader."""

    latencies_s: list[float] = field(default_factory=list)
    """Of each request that was timed."""
    first_token_s: list[float] = field(default_factory=list)
    """Likewise; empty where nothing is generated."""
    token_s: list[float] = field(default_factory=list)
    """Of every further token of all of them."""
    sent_bytes: int = 0
    """Of one request, on the device that sends most."""
    num_exchanges: int = 0
    answer_BH: Tensor | None = None
    """The mean of the prompt's hidden states."""
    max_rel_error: float | None = None
    """Of ``answer_BH``, against this device alone in FP32. None: there was no room for that."""


def time_plans(
    stack: ExitStack,
    group: Group | None,
    request: InferenceRequest,
    trials: Sequence[tuple[ShardReader, InferencePlan]],
    repeats: int,
) -> list[Timed]:
    """``repeats`` answers of each model under its plan, after some that are not timed; empty on all devices but the
    leader. Models have one vocabulary.

    The prompt's tokens are random. Where tokens are generated, it is greedily, and always all ``num_new_tokens``.
    Called on all devices of ``group`` alike; blocks. Engines are closed with ``stack``.
    """
    known: dict[Path, dict[Piece, Layer]] = {reader.directory: {} for reader, _ in trials}
    engines = [
        stack.enter_context(Engine(reader.directory, group=group, plan=plan, known=known[reader.directory]))
        for reader, plan in trials
    ]
    ids_BT = random_prompt(min(reader.spec.vocab_size for reader, _ in trials), request)
    found = time_engines(engines, group, ids_BT, request.num_new_tokens, repeats)
    if group is not None and group.rank:
        for engine in reversed(engines):  # as the leader closes them: over gloo each goodbye waits to be heard
            engine.follow()
        return []
    _compare([reader for reader, _ in trials], known, ids_BT, found)
    return found


def random_prompt(vocab_size: int, request: InferenceRequest) -> Tensor:
    """Token ids (B, T), always the same."""
    shape = (request.batch, request.num_tokens)
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def time_engines(
    engines: Sequence[Engine], group: Group | None, ids_BT: Tensor, num_new_tokens: int, repeats: int
) -> list[Timed]:
    """As ``time_plans``, of engines whose plans are for devices of ``group``, which may exchange over groups of their
    own. They stay open: the others are to follow."""
    found = [Timed() for _ in engines]
    for turn in range(_WARM_UPS + repeats):
        is_timed = turn >= _WARM_UPS
        num_new = num_new_tokens if is_timed else min(_WARM_UP_TOKENS, num_new_tokens)
        for step in range(len(engines)):
            index = (turn + step) % len(engines)
            if group is not None:
                start(group)
            _answer(engines[index], ids_BT, num_new, found[index], is_timed=is_timed)
    _share_most(group, found)
    if num_new_tokens:
        for engine, timed in zip(engines, found, strict=True):
            _hidden(engine, ids_BT, timed)
    return found


def _answer(engine: Engine, ids_BT: Tensor, num_new_tokens: int, timed: Timed, *, is_timed: bool) -> None:
    """One request; what was seen of it comes into ``timed``."""
    times_s: list[float] = []

    def note(ids: list[int]) -> bool:
        times_s.append(time.perf_counter())
        return False

    before = engine.stats
    start_s = time.perf_counter()
    if num_new_tokens and engine.is_leader:
        settings = GenerationSettings(max_new_tokens=num_new_tokens)
        engine.generate_tokens(ids_BT, torch.ones_like(ids_BT), settings, note)
    else:
        _hidden(engine, ids_BT, timed)
    end_s = time.perf_counter()
    after = engine.stats
    if before is not None and after is not None:
        timed.sent_bytes = after.bytes_sent - before.bytes_sent
        timed.num_exchanges = after.num_exchanges - before.num_exchanges
    if is_timed:
        timed.latencies_s.append(end_s - start_s)
        timed.first_token_s += [first_s - start_s for first_s in times_s[:1]]
        timed.token_s += [late_s - early_s for early_s, late_s in pairwise(times_s)]


def _hidden(engine: Engine, ids_BT: Tensor, timed: Timed) -> None:
    """On the leader the request for hidden states, on the others whatever the leader asks for."""
    if engine.is_leader:
        timed.answer_BH = engine.mean(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    else:
        engine.follow_once()


def _share_most(group: Group | None, found: Sequence[Timed]) -> None:
    """Each plan's ``sent_bytes`` becomes the largest over the devices."""
    if group is None:
        return
    own = torch.tensor([timed.sent_bytes for timed in found])
    parts = [torch.empty_like(own) for _ in range(group.world_size)]
    group.all_gather(parts, own)
    for timed, most in zip(found, torch.stack(parts).amax(dim=0).tolist(), strict=True):
        timed.sent_bytes = most


def _compare(
    readers: Sequence[ShardReader], known: dict[Path, dict[Piece, Layer]], ids_BT: Tensor, found: Sequence[Timed]
) -> None:
    """Fills in ``max_rel_error``, unless this device's memory has no room for the whole model in FP32."""
    answers: dict[Path, Tensor | None] = {}
    for reader in readers:
        if reader.directory not in answers:
            answers[reader.directory] = _alone(reader, known[reader.directory], ids_BT)
    for reader, timed in zip(readers, found, strict=True):
        wanted_BH = answers[reader.directory]
        if timed.answer_BH is not None and wanted_BH is not None:
            timed.max_rel_error = float((timed.answer_BH - wanted_BH).abs().max() / wanted_BH.abs().max())


def _alone(reader: ShardReader, known: dict[Piece, Layer], ids_BT: Tensor) -> Tensor | None:
    """The answer of this device alone, in FP32."""
    single = InferencePlan.even("single", 1)
    [pieces] = pieces_of(single, reader.spec)
    if free_memory_bytes() < 1.25 * held_bytes(reader.spec, set(pieces) - set(known)):
        return None
    engine = Engine(reader.directory, plan=single, known=known)
    return engine.mean(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
