"""``Engine``: one model on one or several devices that answer a request together.

The device with rank 0 leads: it is asked, tells the others what to compute, and has the answer. The others ``follow``.
When a device is lost, those that are left go on, if they know how (``recover``).

Shapes: B batch, T tokens, H hidden size, n new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.data.tokenizer import load_tokenizer
from isthmus.inference.generation import OnTokens, check_can_generate, check_length
from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.prompting import Answers, encode_prompts, end_and_padding, pad_left
from isthmus.inference.session import Arrangement, Session, Task
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.sentence import read_pooling
from isthmus.models.shards import ShardReader
from isthmus.planning.pieces import Piece, parts_of, pieces_on
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import Completion, GenerationSettings
from isthmus.spec.inference import InferencePlan
from isthmus.transport.base import Group
from isthmus.transport.endpoint import TransportStats
from isthmus.transport.errors import EndedError, PeerLostError, TransportError

POOLINGS = ("mean", "cls", "tokens")
Recover = Callable[[PeerLostError], Arrangement]
"""Called on all devices that are left when some are lost: what these have agreed on. Its group is the engine's."""
Result = TypeVar("Result")


class Engine:
    """See the module's docstring. ``close`` ends the followers too; use it as a context manager."""

    def __init__(
        self,
        model: str | Path,
        *,
        group: Group | None = None,
        plan: InferencePlan | None = None,
        arranged: Arrangement | None = None,
        recover: Recover | None = None,
        progress: Callable[[float], None] = lambda share: None,
        known: dict[Piece, Layer] | None = None,
    ) -> None:
        """Reads this device's part of ``model`` (a directory or a Hugging Face id). Called on every device of ``group``
        with the same ``plan``; without one, all devices divide heads and columns (or sub-blocks) evenly in FP32.
        ``arranged``: instead of both, with several plans. ``recover``: without, a device that is lost is the end.
        ``known``: what other engines of this device have read of the same model; what this one reads is added.

        Raises ``IsthmusError`` for a model that cannot be divided, ``FileNotFoundError`` for none.
        """
        self.directory = resolve_checkpoint(model)
        self._reader = ShardReader(self.directory)
        self.spec = self._reader.spec
        if arranged is None:
            if plan is None:
                num_devices = group.world_size if group is not None else 1
                plan = InferencePlan.even("tensor" if self.spec.decoupling is None else "block", num_devices)
            arranged = Arrangement(group=group, plans=(plan,))
        self.is_leader = arranged.group is None or arranged.group.rank == 0
        self._recover, self._progress = recover, progress
        self._num_devices = arranged.group.world_size if arranged.group is not None else 1
        self._known: dict[Piece, Layer] = {} if known is None else known
        self._own_group: Group | None = None
        """Of those that have met again."""
        try:
            self._session = Session(self._reader, arranged, progress=progress, known=self._known)
        except PeerLostError as error:
            self._session = self._reopen(error)
        self._tokenizer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if isinstance(error, TransportError):
                self._session.abandon(error)  # nobody can be told any more
            else:
                self.close()
        except TransportError:
            if error is None:  # else what went wrong first is to be seen
                raise

    def close(self) -> None:
        """Lets the followers go. The group stays open: it is the caller's."""
        try:
            self._session.close()
        except TransportError as error:
            self._session.abandon(error)
            if self._recover is None or not isinstance(error, PeerLostError):
                raise  # else those that are left hear from the others that nothing is asked any more
        if self._own_group is not None:
            self._own_group.close()

    @property
    def plan(self) -> InferencePlan:
        """Of the request that was answered last."""
        return self._session.plan

    @property
    def local_models(self) -> list[LocalModel]:
        """What this device holds for each plan that it has a part in; none where the engine is closed."""
        return [execution.strategy.model for execution in self._session.executions]

    @property
    def stats(self) -> TransportStats | None:
        """See ``Session.stats``."""
        return self._session.stats

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own, loaded when it is first used."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.directory)
        return self._tokenizer

    # --- the leader ---------------------------------------------------------------------------------------------------

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        batch_size: int = 32,
    ) -> list[Tensor]:
        """One vector (H,) per text, FP32, or with ``pooling`` ``tokens`` one for each of its tokens (t, H).

        ``mean`` is over a text's tokens, ``cls`` takes the first one's. ``normalize`` divides by the length. None: as
        the checkpoint says if it is one of sentence-transformers, else the mean as it is. Texts longer than the model
        allows raise ``IsthmusError``. Leader only; blocks.
        """
        own = read_pooling(self.directory)
        pooling = own.pooling if pooling is None else pooling
        normalize = own.normalize if normalize is None else normalize
        if pooling not in POOLINGS:
            raise IsthmusError(f"pooling: got {pooling!r}, wanted one of {', '.join(POOLINGS)}")
        vectors: list[Tensor] = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            encoded = self.tokenizer(batch, padding=len(batch) > 1, return_tensors="pt")
            mask_BT = encoded["attention_mask"].bool()
            if pooling == "mean":
                found = list(self.mean(encoded["input_ids"], mask_BT))
            else:
                hidden_BTH = self.hidden(encoded["input_ids"], mask_BT)
                found = [hidden_TH[mask_T] for hidden_TH, mask_T in zip(hidden_BTH, mask_BT, strict=True)]
                found = [hidden_tH[0] for hidden_tH in found] if pooling == "cls" else found
            vectors += [F.normalize(vector, dim=-1) for vector in found] if normalize else found
        return vectors

    def mean(self, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        """The mean (B, H) of the hidden states of the tokens that are not padding. Leader only."""
        total_BH = self._lead(Task.TOTAL, ids_BT, attended_BT)
        return total_BH / attended_BT.sum(dim=1, keepdim=True).clamp(min=1)

    def hidden(self, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        """The last hidden states (B, T, H). Leader only."""
        return self._lead(Task.HIDDEN, ids_BT, attended_BT)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        chat: bool = False,
        stream: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Continues ``prompts``, together as one batch: greedily, or with ``temperature``, ``top_k`` or ``top_p`` by
        drawing, where the same ``seed`` gives the tokens that transformers' ``generate`` gives on one device.

        A prompt's text ends with the model's own end token (unless ``ignore_end``) or before one of ``stop``. ``chat``:
        each prompt is what a user says, put into the model's chat template. ``stream`` gets the number of a prompt and
        the next piece of its text as soon as it can be read. Raises ``IsthmusError`` for an encoder, a plan that
        divides tokens, and more tokens than the model allows. Leader only; blocks.
        """
        prompt_ids = encode_prompts(self.tokenizer, prompts, chat=chat)
        end_tokens, padding = end_and_padding(self._reader)
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            end_tokens=() if ignore_end else end_tokens,
            padding_token=padding,
        )
        answers = Answers(self.tokenizer, prompt_ids, settings, stop=stop, stream=stream)
        self.generate_tokens(*pad_left(prompt_ids, padding), settings, answers.add)
        return answers.end()

    def generate_tokens(
        self,
        ids_BT: Tensor,
        attended_BT: Tensor,
        settings: GenerationSettings,
        on_tokens: OnTokens = lambda ids: False,
    ) -> Tensor:
        """New tokens (B, n) of prompts that are padded on the left. See ``generate`` and ``Generation.run``."""
        self._check_leads()
        for plan in self._session.plans:
            check_can_generate(self._reader, plan)
        check_length(self._reader, ids_BT.shape[1], settings.max_new_tokens)
        if settings.is_sampling and settings.seed is None:
            settings = replace(settings, seed=torch.seed())  # a request that is repeated gives the same tokens
        given: list[list[int]] = []
        stop = False

        def answer(session: Session) -> Tensor:
            number, again = 0, tuple(given)

            def pass_on(ids: list[int]) -> bool:
                nonlocal number, stop
                number += 1
                if number > len(again):
                    given.append(ids)
                    stop = on_tokens(ids)
                return stop and number >= len(given)

            return session.generate(ids_BT, attended_BT, settings, pass_on, again)

        return self._asked(answer)

    def _check_leads(self) -> None:
        if not self.is_leader:
            raise IsthmusError("engine: only rank 0 is asked; the other devices call follow()")

    def _lead(self, task: Task, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        self._check_leads()
        if ids_BT.shape[1] > self.spec.max_num_tokens:
            raise IsthmusError(
                f"text: {ids_BT.shape[1]} tokens, and {self.spec.model_type} at {self.directory} allows "
                f"{self.spec.max_num_tokens}; shorten it or divide it"
            )
        return self._asked(lambda session: session.compute(task, ids_BT, attended_BT))

    def _asked(self, request: Callable[[Session], Result]) -> Result:
        """The answer to ``request``, which is asked again, once, of the devices that are left when some are lost."""
        try:
            return request(self._session)
        except PeerLostError as error:
            self._rejoin(error)
        try:
            return request(self._session)
        except PeerLostError as error:
            self._rejoin(error)  # for the next request
            raise

    # --- everybody ----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Computes what the leader asks for until it closes. A device that has no part returns at once, unless it is
        to take the place of one that is lost."""
        while self.follow_once():
            pass

    def follow_once(self) -> bool:
        """Computes one request, or learns that it is not needed for it. False: the leader has closed, or this device
        has no part in any plan and never will have."""
        try:
            try:
                if self._session.has_part or self._recover is None:
                    return self._session.follow_once()
                lost = PeerLostError("this device has had no part so far")
            except PeerLostError as error:
                lost = error
            self._rejoin(lost)
        except EndedError:
            return False
        return True

    def _rejoin(self, error: PeerLostError) -> None:
        """A new session of the devices that are left."""
        self._session.abandon(error)
        self._session = self._reopen(error)

    def _reopen(self, error: PeerLostError) -> Session:
        """When another device is lost on the way, those that are left try again, as often as there are devices to lose.
        Raises ``error`` where nobody knows how to go on."""
        if self._recover is None:
            raise error
        for _ in range(self._num_devices):
            try:
                arranged = self._recover(error)
                self._own_group = arranged.group
                self._forget_all_but(arranged)
                return Session(self._reader, arranged, progress=self._progress, known=self._known)
            except PeerLostError as another:
                error = another
        raise error

    def _forget_all_but(self, arranged: Arrangement) -> None:
        """Weights that are not needed any more make room for those that are."""
        mine = arranged.group.rank if arranged.group is not None else 0
        needed = pieces_on(mine, arranged.plans, self.spec)
        for part in self._known.keys() - parts_of(self.spec, needed, is_frugal=arranged.is_frugal):
            del self._known[part]
