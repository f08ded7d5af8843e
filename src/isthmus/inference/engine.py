"""``Engine``: one model on one or several devices that answer a request together.

The device with rank 0 leads: it is asked, tells the others what to compute, and has the answer. The others ``follow``.
Every request begins with a header that all receive, so that devices never disagree about what comes next.
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

from isthmus.inference.generation import Generation, OnTokens, check_can_generate, check_length
from isthmus.inference.model import LocalModel
from isthmus.inference.prompting import Answers, encode_prompts, end_and_padding, pad_left
from isthmus.inference.strategies import make_strategy
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.sentence import read_pooling
from isthmus.models.shards import ShardReader
from isthmus.planning.workload import check_strategy
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import Completion, GenerationSettings
from isthmus.spec.inference import InferencePlan
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.transformer import Range
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
        plan: InferencePlan | None = None,
        progress: Callable[[float], None] = lambda share: None,
        known: Sequence[LocalModel] = (),
    ) -> None:
        """Reads this device's part of ``model`` (a directory or a Hugging Face id). Called on every device of ``group``
        with the same ``plan``; without one, all devices divide heads and columns evenly in FP32.
        ``known``: what other engines of this device have read of the same model (``local_model``).

        Raises ``IsthmusError`` for a model that cannot be divided, ``FileNotFoundError`` for none.
        """
        num_devices = group.world_size if group is not None else 1
        self.directory = resolve_checkpoint(model)
        self._reader = ShardReader(self.directory)
        self.spec = self._reader.spec
        self.plan = plan or InferencePlan.even("tensor" if self.spec.decoupling is None else "block", num_devices)
        if self.plan.devices[-1] >= num_devices or self.plan.devices[0] != 0:
            raise IsthmusError(
                f"devices: got ranks {self.plan.devices} in the plan for {num_devices}, wanted 0 among them"
            )
        check_strategy(self.plan, self.spec)
        self.group = group
        rank = group.rank if group is not None else 0
        self.is_leader = rank == 0
        self._working: Group | None = None
        if group is not None and rank in self.plan.devices and len(self.plan.devices) > 1:
            self._working = group.subgroup(self.plan.devices) if len(self.plan.devices) < num_devices else group
        takes_part = rank in self.plan.devices
        self._strategy: Strategy | None = None
        if takes_part:
            self._strategy = make_strategy(self.plan, self._reader, self._working, progress, known)
        self._generation: Generation | None = None
        self._tokenizer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TransportError):
            self._strategy = None  # nobody can be told any more, and the error is to be seen
        else:
            self.close()

    def close(self) -> None:
        """Lets the followers go. The group stays open: it is the caller's."""
        if self.is_leader and self._working is not None and self._strategy is not None:
            self._announce(_Request.STOP, (0, 0))
        self._strategy = None

    @property
    def local_model(self) -> LocalModel | None:
        """What this device holds; None where it has no part, or the engine is closed."""
        return None if self._strategy is None else self._strategy.model

    @property
    def stats(self) -> TransportStats | None:
        """What this device has sent and received under this engine's plan; None where it works with no other. Where
        the plan has all devices of the group, what went over the group before is in it."""
        return None if self._working is None else self._working.stats

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
        check_can_generate(self._reader, self.plan)
        check_length(self._reader, ids_BT.shape[1], settings.max_new_tokens)
        text = torch.frombuffer(bytearray(to_json(settings).encode()), dtype=torch.uint8)
        self._announce(_Request.GENERATE, ids_BT.shape, len(text))
        if self._working is not None:
            self._working.broadcast(torch.stack((ids_BT, attended_BT.long())))
            self._working.broadcast(text)
        return self._generate(ids_BT, attended_BT, settings, on_tokens)

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
        self._announce(request, ids_BT.shape)
        if self._working is not None:
            self._working.broadcast(torch.stack((ids_BT, attended_BT.long())))
        answer = self._compute(request, ids_BT, attended_BT)
        assert answer is not None
        return answer

    def _announce(self, request: _Request, shape: Sequence[int], num_settings_bytes: int = 0) -> None:
        if self._working is not None:
            self._working.broadcast(torch.tensor([request, *shape, num_settings_bytes]))

    # --- everybody ----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Computes what the leader asks for until it closes. Returns at once on a device that has no part."""
        while self.follow_once():
            pass

    def follow_once(self) -> bool:
        """Computes one request. False: the leader has closed, or this device has no part."""
        if self._working is None:
            return False
        header = torch.empty(4, dtype=torch.int64)
        self._working.broadcast(header)
        request, batch, num_tokens, num_settings_bytes = header.tolist()
        if request == _Request.STOP:
            return False
        tokens = torch.empty(2, batch, num_tokens, dtype=torch.int64)
        self._working.broadcast(tokens)
        if request == _Request.GENERATE:
            text = torch.empty(num_settings_bytes, dtype=torch.uint8)
            self._working.broadcast(text)
            settings = from_json(GenerationSettings, bytes(text.tolist()).decode())
            self._generate(tokens[0], tokens[1].bool(), settings)
        else:
            self._compute(_Request(request), tokens[0], tokens[1].bool())
        return True

    def _generate(
        self,
        ids_BT: Tensor,
        attended_BT: Tensor,
        settings: GenerationSettings,
        on_tokens: OnTokens = lambda ids: False,
    ) -> Tensor:
        if self._generation is None:
            assert self._strategy is not None
            self._generation = Generation(self._strategy, self._reader, self.plan)
        return self._generation.run(ids_BT, attended_BT.bool(), settings, on_tokens)

    @torch.inference_mode()
    def _compute(self, request: _Request, ids_BT: Tensor, attended_BT: Tensor) -> Tensor | None:
        """The leader's answer; what it is on the others does not matter."""
        assert self._strategy is not None
        tokens = Tokens.of(ids_BT, attended_BT, is_decoder=self.spec.is_decoder)
        hidden_BtH = self._strategy.run(tokens)
        ranges = self._strategy.token_ranges(ids_BT.shape[1])
        if request == _Request.TOKENS:
            return hidden_BtH if ranges is None else self._gather(hidden_BtH, ranges)
        if ranges is None or self._working is None:
            return (hidden_BtH * attended_BT[:, :, None]).sum(dim=1)
        own = ranges[self._working.rank]
        part_BH = (hidden_BtH * attended_BT[:, own.start : own.stop, None]).sum(dim=1, keepdim=True)
        parts_BRH = self._gather(part_BH, [Range(start=rank, stop=rank + 1) for rank in range(len(ranges))])
        return None if parts_BRH is None else parts_BRH.sum(dim=1)

    def _gather(self, part_BtH: Tensor, ranges: list[Range]) -> Tensor | None:
        """The devices' parts one after the other along dimension 1, on the leader; None on the others."""
        assert self._working is not None
        shape = (part_BtH.shape[0], -1, part_BtH.shape[2])
        sizes = [len(part) * shape[0] * shape[2] for part in ranges]
        flat = torch.empty(sum(sizes) if self.is_leader else 0)
        outputs = list(flat.split(sizes)) if self.is_leader else None
        self._working.gather(outputs, part_BtH.contiguous())
        return None if outputs is None else torch.cat([part.view(shape) for part in outputs], dim=1)
