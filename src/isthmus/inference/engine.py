"""``Engine``: one model on one or several devices that answer a request together.

The device with rank 0 leads: it is asked, tells the others what to compute, and has the answer. The others ``follow``.
Every request begins with a header that all receive, so that devices never disagree about what comes next. With several
plans it says which: all of them stay loaded, so that another one for the next request moves no weights.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from isthmus.inference.execution import Execution
from isthmus.inference.generation import OnTokens, check_can_generate, check_length
from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.prompting import Answers, encode_prompts, end_and_padding, pad_left
from isthmus.inference.runtime_planner import RuntimePlanner
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.sentence import read_pooling
from isthmus.models.shards import ShardReader
from isthmus.planning.pieces import Piece
from isthmus.planning.workload import check_strategy
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import Completion, GenerationSettings
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group
from isthmus.transport.endpoint import TransportStats
from isthmus.transport.errors import TransportError

POOLINGS = ("mean", "cls", "tokens")


class _Request(enum.IntEnum):
    STOP = 0
    MEAN = 1
    TOKENS = 2
    GENERATE = 3


class Engine:
    """See the module's docstring. ``close`` ends the followers too; use it as a context manager."""

    def __init__(
        self,
        model: str | Path,
        *,
        group: Group | None = None,
        plan: InferencePlan | Sequence[InferencePlan] | None = None,
        planner: RuntimePlanner | None = None,
        progress: Callable[[float], None] = lambda share: None,
        known: dict[Piece, Layer] | None = None,
    ) -> None:
        """Reads this device's part of ``model`` (a directory or a Hugging Face id). Called on every device of ``group``
        with the same ``plan``; without one, all devices divide heads and columns evenly in FP32. Of several plans the
        leader's ``planner`` picks one for each request, without one the first.
        ``known``: what other engines of this device have read of the same model; what this one reads is added.

        Raises ``IsthmusError`` for a model that cannot be divided, ``FileNotFoundError`` for none.
        """
        num_devices = group.world_size if group is not None else 1
        self.directory = resolve_checkpoint(model)
        self._reader = ShardReader(self.directory)
        self.spec = self._reader.spec
        if plan is None:
            plan = InferencePlan.even("tensor" if self.spec.decoupling is None else "block", num_devices)
        self.plans = (plan,) if isinstance(plan, InferencePlan) else tuple(plan)
        for each in self.plans:
            if each.devices[-1] >= num_devices or each.devices[0] != 0:
                raise IsthmusError(
                    f"devices: got ranks {each.devices} in the plan for {num_devices}, wanted 0 among them"
                )
            check_strategy(each, self.spec)
        self.plan = self.plans[0]
        """Of the request that was answered last."""
        self.group, self._planner = group, planner
        rank = group.rank if group is not None else 0
        self.is_leader = rank == 0
        self._groups: dict[tuple[int, ...], Group] = {}
        self._members = tuple(sorted({device for each in self.plans for device in each.devices}))
        """Devices that some plan needs; the leader tells them what comes."""
        self._everybody = self._group_of(self._members)
        known = {} if known is None else known
        self._executions: list[Execution | None] = []
        for number, each in enumerate(self.plans):
            working, before = self._group_of(each.devices), number / len(self.plans)
            self._executions.append(
                Execution(
                    each,
                    self._reader,
                    working,
                    lambda share, before=before: progress(before + share / len(self.plans)),
                    known,
                )
                if rank in each.devices
                else None
            )
        self._last: Execution | None = None
        self._tokenizer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TransportError):
            self._executions = []  # nobody can be told any more, and the error is to be seen
        else:
            self.close()

    def close(self) -> None:
        """Lets the followers go. The group stays open: it is the caller's."""
        if self.is_leader and self._everybody is not None and self._executions:
            self._collected()
            self._announce(_Request.STOP, (0, 0))
        self._executions = []

    @property
    def local_models(self) -> list[LocalModel]:
        """What this device holds for each plan that it has a part in; none where the engine is closed."""
        return [execution.strategy.model for execution in self._own]

    @property
    def stats(self) -> TransportStats | None:
        """What this device has sent and received with others; None where it works with no other. Where a plan has all
        devices of the group, what went over the group before is in it."""
        groups = {id(group): group for group in (self._everybody, *(each.group for each in self._own)) if group}
        return TransportStats.total(group.stats for group in groups.values()) if groups else None

    @property
    def _own(self) -> list[Execution]:
        return [execution for execution in self._executions if execution is not None]

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own, loaded when it is first used."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.directory)
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
        total_BH = self._lead(_Request.MEAN, ids_BT, attended_BT)
        return total_BH / attended_BT.sum(dim=1, keepdim=True).clamp(min=1)

    def hidden(self, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        """The last hidden states (B, T, H). Leader only."""
        return self._lead(_Request.TOKENS, ids_BT, attended_BT)

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
        for plan in self.plans:
            check_can_generate(self._reader, plan)
        check_length(self._reader, ids_BT.shape[1], settings.max_new_tokens)
        text = torch.frombuffer(bytearray(to_json(settings).encode()), dtype=torch.uint8)
        execution = self._begin(_Request.GENERATE, ids_BT, attended_BT, settings.max_new_tokens, len(text))
        if execution.group is not None:
            execution.group.broadcast(text)
        return execution.generate(ids_BT, attended_BT, settings, on_tokens)

    def _check_leads(self) -> None:
        if not self.is_leader:
            raise IsthmusError("engine: only rank 0 is asked; the other devices call follow()")

    def _lead(self, request: _Request, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
        self._check_leads()
        if ids_BT.shape[1] > self.spec.max_num_tokens:
            raise IsthmusError(
                f"text: {ids_BT.shape[1]} tokens, and {self.spec.model_type} at {self.directory} allows "
                f"{self.spec.max_num_tokens}; shorten it or divide it"
            )
        execution = self._begin(request, ids_BT, attended_BT)
        return _answer(request, execution, ids_BT, attended_BT)

    def _begin(
        self,
        request: _Request,
        ids_BT: Tensor,
        attended_BT: Tensor,
        num_new_tokens: int = 0,
        num_settings_bytes: int = 0,
    ) -> Execution:
        """Chooses a plan, and gives its devices the tokens."""
        number = 0
        if len(self.plans) > 1:
            rates_NN = self._collected()
            if self._planner is not None:
                self._planner.observe(rates_NN.tolist())
                batch, num_tokens = ids_BT.shape
                asked = InferenceRequest(num_tokens=num_tokens, batch=batch, num_new_tokens=num_new_tokens)
                number = self._planner.choose(asked)
        self.plan = self.plans[number]
        self._announce(request, ids_BT.shape, num_settings_bytes, number)
        execution = self._executions[number]
        assert execution is not None
        self._last = execution
        if execution.group is not None:
            execution.group.broadcast(torch.stack((ids_BT, attended_BT.long())))
        return execution

    def _announce(self, request: _Request, shape: Sequence[int], num_settings_bytes: int = 0, number: int = 0) -> None:
        if self._everybody is not None:
            self._everybody.broadcast(torch.tensor([request, *shape, num_settings_bytes, number]))

    def _collected(self) -> Tensor:
        """Bytes a second (N, N) that each device (row) got from each (column) in the last request; 0 where nothing is
        known. The others have sent theirs once they were done: nobody waits for them who would not wait anyway."""
        size = 1 if self.group is None else self.group.world_size
        rates_NN, execution = torch.zeros(size, size), self._last
        if (
            len(self.plans) > 1
            and execution is not None
            and execution.group is not None
            and self._everybody is not None
        ):
            rates_NN[0] = self._rates(execution)
            for device in execution.plan.devices[1:]:
                self._everybody.recv(rates_NN[device], self._members.index(device))
        self._last = None
        return rates_NN

    # --- everybody ----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Computes what the leader asks for until it closes. Returns at once on a device that has no part."""
        while self.follow_once():
            pass

    def follow_once(self) -> bool:
        """Computes one request, or learns that it is not needed for it. False: the leader has closed, or this device
        has no part in any plan."""
        if self._everybody is None:
            return False
        header = torch.empty(5, dtype=torch.int64)
        self._everybody.broadcast(header)
        request, batch, num_tokens, num_settings_bytes, number = header.tolist()
        if request == _Request.STOP:
            return False
        self.plan, execution = self.plans[number], self._executions[number]
        if execution is None or execution.group is None:
            return True
        tokens = torch.empty(2, batch, num_tokens, dtype=torch.int64)
        execution.group.broadcast(tokens)
        ids_BT, attended_BT = tokens[0], tokens[1].bool()
        if request == _Request.GENERATE:
            text = torch.empty(num_settings_bytes, dtype=torch.uint8)
            execution.group.broadcast(text)
            settings = from_json(GenerationSettings, bytes(text.tolist()).decode())
            execution.generate(ids_BT, attended_BT, settings, lambda ids: False)
        else:
            _answer(_Request(request), execution, ids_BT, attended_BT)
        if len(self.plans) > 1:
            self._everybody.send(self._rates(execution), 0)
        return True

    def _rates(self, execution: Execution) -> Tensor:
        """Bytes a second (N,) that this device got from each in the last request; 0 where nothing is known."""
        assert self.group is not None and execution.group is not None
        rates_N = torch.zeros(self.group.world_size)
        for peer, rate in execution.group.take_arrival_rates().items():
            rates_N[execution.plan.devices[peer]] = rate
        return rates_N

    def _group_of(self, devices: tuple[int, ...]) -> Group | None:
        """Of those devices, made once; None where this is the only one or not among them. Called on all alike."""
        group = self.group
        if group is None or group.rank not in devices or len(devices) == 1:
            return None
        if len(devices) == group.world_size and len(self.plans) == 1:
            return group
        if devices not in self._groups:
            self._groups[devices] = group.subgroup(devices)
        return self._groups[devices]


def _answer(request: _Request, execution: Execution, ids_BT: Tensor, attended_BT: Tensor) -> Tensor:
    compute = execution.hidden if request == _Request.TOKENS else execution.total
    return compute(ids_BT, attended_BT)
