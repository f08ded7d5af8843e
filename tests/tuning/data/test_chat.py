"""Of a conversation exactly what the assistant says is predicted, whatever the template."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data import IGNORED, BatchStream, load_dataset
from isthmus.tuning.data.chat import assistant_spans, conversation_completions, conversation_tokens
from isthmus.tuning.data.fields import Conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
# Like Qwen3: only the last turn keeps its (here empty) reasoning.
REASONING = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The generation prompt opens something that finished turns do not have.
OPENING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
STRICT = "{{ raise_exception('roles must alternate') }}"

TURNS = Conversation(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "Seven, ünïcode."},
    ],
    "a.jsonl:1",
)


def predicted(tokenizer: PreTrainedTokenizerFast, conversation: Conversation = TURNS) -> list[tuple[str, str]]:
    """(whole text, predicted text) of each example."""
    return [
        (
            str(tokenizer.decode(token_ids)),
            str(tokenizer.decode([token for token, flag in zip(token_ids, is_label, strict=True) if flag])),
        )
        for token_ids, is_label in conversation_tokens(conversation, tokenizer)
    ]


def test_spans_are_found_by_rendering_prefixes(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    [(text, spans)] = assistant_spans(TURNS, tokenizer)
    assert [text[start:end] for start, end in spans] == ["Four.<|im_end|>\n", "Seven, ünïcode.<|im_end|>\n"]
    assert predicted(tokenizer) == [(text, "Four.<|im_end|>\nSeven, ünïcode.<|im_end|>\n")]


def test_generation_blocks_of_the_template_are_believed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MARKED
    [(text, labels)] = predicted(tokenizer)
    assert text.startswith("[system]Be brief.[user]")
    assert labels == "Four.</s>Seven, ünïcode.</s>"


def test_a_template_that_renders_earlier_turns_differently_gives_one_example_per_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = REASONING
    first, second = predicted(tokenizer)
    assert first[0].endswith("<assistant><think></think>Four.</>") and first[1] == "<think></think>Four.</>"
    assert "<assistant>Four.</><user>" in second[0] and second[1] == "<think></think>Seven, ünïcode.</>"


def test_a_generation_prompt_that_turns_do_not_have_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = OPENING
    [(_, labels)] = predicted(tokenizer)
    assert labels.startswith("<|im_start|>assistant\nFour.<|im_end|>")


def test_a_conversation_may_begin_with_the_assistant(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    [(text, labels)] = predicted(tokenizer, Conversation([{"role": "assistant", "content": "Hello."}], "x"))
    assert labels == text


def test_no_assistant_turn_makes_no_example(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    assert conversation_tokens(Conversation(TURNS.messages[:2], "x"), tokenizer) == []


def test_encoder_decoder_models_get_each_answer_after_all_before_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    first, second = conversation_completions(TURNS, tokenizer)
    assert first.prompt.endswith("Two and two?<|im_end|>\n<|im_start|>assistant\n")
    assert first.completion == "Four.<|im_end|>\n"
    assert second.prompt.startswith(first.prompt + first.completion)


def test_without_a_chat_template_the_error_names_the_record(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(IsthmusError, match=r"a\.jsonl:1 is a conversation, .* no chat template"):
        conversation_tokens(TURNS, tokenizer)


def test_a_conversation_that_the_template_refuses_names_the_record(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = STRICT
    with pytest.raises(IsthmusError, match=r"a\.jsonl:1: .* does not accept this conversation: roles must alternate"):
        conversation_tokens(TURNS, tokenizer)


def test_conversations_from_a_file_are_predicted_after_their_prompts(
    tokenizer: PreTrainedTokenizerFast, write_lines
) -> None:
    tokenizer.chat_template = CHATML
    path: Path = write_lines({"messages": TURNS.messages}, {"messages": TURNS.messages[:2]})
    dataset = load_dataset(path, tokenizer, seq_len=256)
    assert (len(dataset), dataset.summary.num_without_labels) == (1, 1)
    [batch] = BatchStream(dataset).next_step()
    labels = batch.inputs["labels"][0]
    assert tokenizer.decode(labels[labels != IGNORED]) == "Four.<|im_end|>\nSeven, ünïcode.<|im_end|>\n"
