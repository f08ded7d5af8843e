"""Between texts and tokens: prompts as a batch, and new tokens as text that grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from isthmus.models.shards import ShardReader
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import Completion, GenerationSettings

_GENERATION_CONFIG = "generation_config.json"
# What a decoder writes for bytes that are no whole character yet.
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Each prompt's tokens; with ``chat`` as the words of a user in the tokenizer's chat template, answer to follow.

    Raises ``IsthmusError`` for no prompt, an empty one, and a tokenizer without such a template.
    """
    if isinstance(prompts, str) or not prompts:
        raise IsthmusError(f"prompts: got {prompts!r}, wanted a list with one text or more")
    if chat and not tokenizer.chat_template:
        raise IsthmusError("chat: the model's tokenizer has no chat template; do without chat")
    encoded = []
    for prompt in prompts:
        if chat:
            message = {"role": "user", "content": prompt}
            ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise IsthmusError(f"prompt: {prompt!r} has no token, wanted one or more")
        encoded.append(list(ids))
    return encoded


def pad_left(prompt_ids: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """ids (B, T) int64 and where they are not padding (B, T) bool."""
    num_tokens = max(len(ids) for ids in prompt_ids)
    rows = [[padding] * (num_tokens - len(ids)) + list(ids) for ids in prompt_ids]
    masks = [[False] * (num_tokens - len(ids)) + [True] * len(ids) for ids in prompt_ids]
    return torch.tensor(rows), torch.tensor(masks)


def end_and_padding(reader: ShardReader) -> tuple[tuple[int, ...], int]:
    """The tokens that end a text, and the one to pad with, as the checkpoint's files say."""
    config: Any = reader.config
    if (reader.directory / _GENERATION_CONFIG).is_file():
        config = GenerationConfig.from_pretrained(reader.directory)
    ends = config.eos_token_id
    end_tokens = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    padding = config.pad_token_id
    return end_tokens, padding if padding is not None else next(iter(end_tokens), 0)


class _Answer:
    """One prompt's text. Characters are held back until they are whole, and until they are no part of a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self.tokens: list[int] = []
        self.ended_by: Literal["end", "stop", "length"] | None = None
        self.text = ""
        self._num_told = 0
        # Tokens are decoded together with some before them: what a token looks like can depend on those.
        self._context = self._num_read = 0

    def add(self, token: int, is_last: bool) -> None:
        self.tokens.append(token)
        before = self._decode(self._context, self._num_read)
        now = self._decode(self._context, len(self.tokens))
        if is_last or (len(now) > len(before) and not now.endswith(_UNREADABLE)):
            self.text += now[len(before) :]
            self._context, self._num_read = self._num_read, len(self.tokens)
        found = [place for text in self._stop if (place := self.text.find(text)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.ended_by = "stop"

    def new_piece(self) -> str:
        """What can be told now and was not told before."""
        num_safe = len(self.text)
        if self.ended_by is None:
            num_safe -= max((_overlap(self.text, text) for text in self._stop), default=0)
        piece = self.text[self._num_told : num_safe]
        self._num_told = max(self._num_told, num_safe)
        return piece

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(
            self.tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)


class Answers:
    """The texts of a batch, as they grow."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        stop: Sequence[str] = (),
        stream: Callable[[int, str], None] | None = None,
    ) -> None:
        """``stream`` gets the number of a prompt and the next piece of its text. Raises ``IsthmusError`` for an empty
        text in ``stop``."""
        if isinstance(stop, str) or not all(stop):
            raise IsthmusError(f"stop: got {stop!r}, wanted texts that are not empty")
        self._settings, self._stream = settings, stream
        self._num_prompt_tokens = [len(ids) for ids in prompt_ids]
        self._answers = [_Answer(tokenizer, stop) for _ in prompt_ids]

    def add(self, ids: list[int]) -> bool:
        """One more token of each; whether all have ended."""
        for number, (answer, token) in enumerate(zip(self._answers, ids, strict=True)):
            if answer.ended_by is None:
                is_end = token in self._settings.end_tokens
                is_last = len(answer.tokens) + 1 == self._settings.max_new_tokens
                answer.add(token, is_end or is_last)
                if answer.ended_by is None and (is_end or is_last):
                    answer.ended_by = "end" if is_end else "length"
                piece = answer.new_piece()
                if piece and self._stream is not None:
                    self._stream(number, piece)
        return all(answer.ended_by is not None for answer in self._answers)

    def end(self) -> list[Completion]:
        completions = []
        for answer, num_prompt_tokens in zip(self._answers, self._num_prompt_tokens, strict=True):
            completion = Completion(
                text=answer.text,
                tokens=tuple(answer.tokens),
                num_prompt_tokens=num_prompt_tokens,
                ended_by=answer.ended_by or "length",
            )
            completions.append(completion)
        return completions
