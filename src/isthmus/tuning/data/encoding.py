"""Text to token ids: documents, completions and conversations become examples, as long as they happen to be.

Special tokens are put around the text here and in ``fitting.py``, from a ``Frame`` that is read off the tokenizer once;
the text itself is always tokenised without them, so that cutting it never loses or doubles one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from isthmus.tuning.data.chat import conversation_completions, conversation_tokens
from isthmus.tuning.data.fields import Completion, Conversation, Document

SEGMENT_CHARS = 1 << 20
"""Longer documents are tokenised in segments, cut at line ends: a tokenizer needs about 100 bytes per character."""
CALL_CHARS = 1 << 23


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts before and after a text."""

    lead: tuple[int, ...]
    trail: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lead) + len(self.trail)


@dataclass(frozen=True, eq=False)
class Example:
    """Tokens of one example, (T,) int32, and which of them are to be predicted, (T,) bool.

    A document may be split into pieces; anything else must stay together. Examples of encoder–decoder models are
    without frames; what is to be predicted is then the decoder's, the rest the encoder's.
    """

    token_ids: np.ndarray
    is_label: np.ndarray
    is_document: bool


def tokenizer_frames(tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> tuple[Frame, Frame]:
    """(source, target) frames. Decoders: what the tokenizer puts before a text, and its EOS after it, if it has one.

    Encoder–decoder models: what the tokenizer puts around a source and a target, with EOS at the end in any case.
    """
    eos_token_id: Any = tokenizer.eos_token_id
    eos = () if eos_token_id is None else (int(eos_token_id),)
    if not is_encoder_decoder:
        frame = Frame(_probe(tokenizer, "text").lead, eos)
        return frame, frame
    source, target = _probe(tokenizer, "text"), _probe(tokenizer, "text_target")
    return _closed(source, eos), _closed(target, eos)


def _closed(frame: Frame, eos: tuple[int, ...]) -> Frame:
    # NLLB's older layout has EOS before the language at the end: it is there, so it stays as it is.
    return frame if set(eos) <= set(frame.trail) else Frame(frame.lead, frame.trail + eos)


def _probe(tokenizer: PreTrainedTokenizerBase, argument: Literal["text", "text_target"]) -> Frame:
    text: Any = {argument: "a"}
    encoded: Any = tokenizer(**text, return_special_tokens_mask=True, verbose=False)
    token_ids, is_special = encoded["input_ids"], encoded["special_tokens_mask"]
    content = [position for position, special in enumerate(is_special) if not special]
    first, last = (content[0], content[-1]) if content else (len(token_ids), len(token_ids))
    return Frame(tuple(token_ids[:first]), tuple(token_ids[last + 1 :]))


class Encoder:
    """Encodes for one tokenizer and kind of model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> None:
        self._tokenizer = tokenizer
        self._is_encoder_decoder = is_encoder_decoder
        self.source_frame, self.target_frame = tokenizer_frames(tokenizer, is_encoder_decoder)

    def encode(self, items: Sequence[Document | Completion | Conversation]) -> list[list[Example]]:
        """The examples of each of ``items``: one as a rule, none where there is nothing to predict.

        For decoders, a newline is put between prompt and completion where neither has white space there; it belongs to
        the prompt.
        Raises ``IsthmusError`` as ``conversation_tokens`` does.
        """
        expanded = [self._expand(item) for item in items]
        parts = [part for group in expanded for part in group if not isinstance(part, Example)]
        contents = self._tokenise([text for part in parts for text in _texts(part)])
        return [
            [part if isinstance(part, Example) else self._assemble(part, contents) for part in group]
            for group in expanded
        ]

    def _expand(self, item: Document | Completion | Conversation) -> Sequence[Document | Completion | Example]:
        """What there is to tokenise; conversations of decoders are tokenised here, since it takes their template."""
        if isinstance(item, Conversation):
            if not self._is_encoder_decoder:
                return [
                    Example(np.asarray(token_ids, np.int32), np.asarray(is_label, bool), is_document=False)
                    for token_ids, is_label in conversation_tokens(item, self._tokenizer)
                    if any(is_label[1:])
                ]
            parts: Sequence[Document | Completion] = conversation_completions(item, self._tokenizer)
        else:
            parts = [item]
        parts = [part for part in parts if (part.text if isinstance(part, Document) else part.completion).strip()]
        return parts if self._is_encoder_decoder else [_separated(part) for part in parts]

    def _assemble(self, part: Document | Completion, contents: Iterator[np.ndarray]) -> Example:
        token_ids = [next(contents) for _ in _texts(part)]
        num_prompt_tokens = len(token_ids[0]) if isinstance(part, Completion) else 0
        if not self._is_encoder_decoder:
            lead, trail = self.source_frame.lead, self.source_frame.trail
            token_ids = [np.asarray(lead, np.int32), *token_ids, np.asarray(trail, np.int32)]
            num_prompt_tokens += len(lead)
        joined = np.concatenate(token_ids)
        return Example(joined, np.arange(len(joined)) >= num_prompt_tokens, is_document=isinstance(part, Document))

    def _tokenise(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Token ids of each text, (T,) int32, without special tokens; one call runs in parallel over its texts."""
        batch: list[str] = []
        num_chars = 0
        for text in texts:
            if batch and num_chars + len(text) > CALL_CHARS:
                yield from self._call(batch)
                batch, num_chars = [], 0
            batch.append(text)
            num_chars += len(text)
        if batch:
            yield from self._call(batch)

    def _call(self, batch: list[str]) -> Iterator[np.ndarray]:
        encoded: Any = self._tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return (np.asarray(token_ids, np.int32) for token_ids in encoded["input_ids"])


def _texts(part: Document | Completion) -> list[str]:
    if isinstance(part, Document):
        return list(_segments(part.text))
    return [part.prompt, part.completion]


def _separated(part: Document | Completion) -> Document | Completion:
    if isinstance(part, Document) or not part.prompt or part.prompt[-1].isspace() or part.completion[0].isspace():
        return part
    return replace(part, prompt=part.prompt + "\n")


def _segments(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        line_end = text.rfind("\n", start, start + SEGMENT_CHARS) + 1
        end = line_end if line_end > start else start + SEGMENT_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
