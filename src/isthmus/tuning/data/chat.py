"""Conversations through a tokenizer's chat template: which of the tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data.fields import Completion, Conversation

ASSISTANT = "assistant"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_tokens(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[bool]]]:
    """(token ids, which of them are the assistant's) of each example that ``conversation`` makes: one as a rule.

    A template that marks the assistant's part with ``{% generation %}`` is believed. Otherwise the spans are found by
    rendering the conversation up to each assistant turn, without and with it. Templates that render a turn differently
    once others follow (those that drop earlier reasoning, or close the last turn in another way) make one example per
    assistant turn instead: what the model sees when it answers there. The template decides how a turn is closed; no
    end-of-text token is added. No assistant turn: no example.

    Raises ``IsthmusError`` naming the record if there is no chat template, or it does not render the conversation.
    """
    if not any(message["role"] == ASSISTANT for message in conversation.messages):
        return []
    template = require_template(conversation, tokenizer)
    if _GENERATION_BLOCK.search(template):
        return [_believe_template(conversation, tokenizer)]
    return [
        _tokens_with_spans(text, spans, conversation, tokenizer)
        for text, spans in assistant_spans(conversation, tokenizer)
    ]


def assistant_spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[tuple[int, int]]]]:
    """(rendered text, character spans of the assistant's turns) of each example: see ``conversation_tokens``."""
    turns = _rendered_turns(conversation, tokenizer)
    text = _render(conversation, tokenizer, conversation.messages)
    if all(text.startswith(until) for _, until in turns):
        return [(text, [(len(before), len(until)) for before, until in turns])]
    return [(until, [(len(before), len(until))]) for before, until in turns]


def conversation_completions(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
    """For encoder–decoder models: each assistant turn as the completion of all that comes before it, rendered."""
    require_template(conversation, tokenizer)
    return [Completion(before, until[len(before) :]) for before, until in _rendered_turns(conversation, tokenizer)]


def require_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's source. Raises ``IsthmusError`` if the tokenizer has none."""
    if not tokenizer.chat_template:
        raise IsthmusError(
            f"data: {conversation.location} is a conversation, but the model's tokenizer has no chat template; "
            "use an instruction-tuned model, add a chat_template.jinja to the model's directory, "
            "or give prompt and completion"
        )
    return tokenizer.get_chat_template()


def _rendered_turns(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """For each assistant turn, the text up to where its answer begins and the text up to its end."""
    turns = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != ASSISTANT:
            continue
        until = _render(conversation, tokenizer, conversation.messages[: number + 1])
        before = _render(conversation, tokenizer, conversation.messages[:number], add_generation_prompt=True)
        if not until.startswith(before):
            # Some generation prompts open what a finished turn does not have (an empty reasoning block).
            before = _render(conversation, tokenizer, conversation.messages[:number])
        if not until.startswith(before):
            raise IsthmusError(
                f"data: {conversation.location}: the chat template does not render message {number + 1} (assistant) "
                "after the ones before it, so its tokens cannot be told apart; "
                "mark them in the template with {% generation %} … {% endgeneration %}"
            )
        turns.append((before, until))
    return turns


def _render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    if not messages:
        # The conversation begins with the assistant: templates need not render nothing.
        return ""
    with _NamingRecord(conversation):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return str(text)


def _believe_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    _require_fast(conversation, tokenizer)
    with _NamingRecord(conversation):
        encoded: Any = tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    return encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]


def _tokens_with_spans(
    text: str, spans: Sequence[tuple[int, int]], conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    _require_fast(conversation, tokenizer)
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_label = [
        any(start < span_end and end > span_start for span_start, span_end in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], is_label


def _require_fast(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise IsthmusError(
            f"data: {conversation.location} is a conversation, and {type(tokenizer).__name__} cannot say which "
            "characters a token stands for; use a model with a tokenizer.json, or give prompt and completion"
        )


class _NamingRecord:
    """Turns what a chat template raises on a conversation it does not accept into an error that names the record."""

    def __init__(self, conversation: Conversation) -> None:
        self._location = conversation.location

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (jinja2.TemplateError, TypeError)):
            raise IsthmusError(
                f"data: {self._location}: the model's chat template does not accept this conversation: {error}"
            ) from error
