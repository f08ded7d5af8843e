"""Loading keeps every token it can, cuts only what it says it cuts, and counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from isthmus.data import load_tokenizer
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data import TokenDataset, encoding, load_dataset
from isthmus.tuning.data import dataset as dataset_module
from isthmus.tuning.data.encoding import Example, Frame
from isthmus.tuning.data.fitting import Fitter

WriteLines = Callable[..., Path]


def texts(dataset: TokenDataset, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """(not to predict, to predict) of each example."""
    return [
        (str(tokenizer.decode(token_ids[~is_label])), str(tokenizer.decode(token_ids[is_label])))
        for token_ids, is_label in map(dataset.example, range(len(dataset)))
    ]


def test_documents_end_with_eos_and_completions_count_alone(
    tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    path = write_lines(
        {"text": "The sum is four."},
        {"prompt": "Two and two?", "completion": "four"},
        {"prompt": "Two and two? ", "completion": "four"},
        {"prompt": "Two and two?", "completion": " four"},
    )
    dataset = load_dataset(path, tokenizer, seq_len=64)
    assert texts(dataset, tokenizer) == [
        ("", "The sum is four.<|endoftext|>"),
        ("Two and two?\n", "four<|endoftext|>"),
        ("Two and two? ", "four<|endoftext|>"),
        ("Two and two?", " four<|endoftext|>"),
    ]
    # The first token of the document has nothing before it.
    assert dataset.summary.num_label_tokens == dataset.is_label.sum() - 1


def test_long_documents_are_split_into_pieces_that_join_to_the_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SEGMENT_CHARS", 100)
    monkeypatch.setattr(encoding, "CALL_CHARS", 250)
    text = "def add(a, b):\n    return a + b\n" * 40 + "x" * 250
    (tmp_path / "code.py").write_text(text)
    dataset = load_dataset(tmp_path, tokenizer, seq_len=32)
    assert tokenizer.decode(dataset.token_ids) == text + "<|endoftext|>"
    assert set(dataset.lengths[:-1]) == {32} and dataset.summary.num_split == 1


@given(st.integers(2, 70))
def test_pieces_of_a_document_keep_every_token_and_are_never_a_lone_token(num_tokens: int) -> None:
    fitter = Fitter(seq_len=8, is_encoder_decoder=False, source_frame=Frame((), ()), target_frame=Frame((), ()))
    pieces = fitter.fit(Example(np.arange(num_tokens, dtype=np.int32), np.ones(num_tokens, bool), is_document=True))
    assert np.concatenate([piece.token_ids for piece in pieces]).tolist() == list(range(num_tokens))
    assert all(2 <= len(piece.token_ids) <= 8 for piece in pieces)


@given(st.integers(0, 20), st.integers(1, 12), st.sampled_from([(), (99,)]))
def test_truncation_takes_only_the_left_of_the_prompt(num_prompt: int, num_labels: int, lead: tuple[int, ...]) -> None:
    token_ids = np.asarray([*lead, *range(num_prompt + num_labels)], np.int32)
    is_label = np.arange(len(token_ids)) >= len(lead) + num_prompt
    fitter = Fitter(seq_len=8, is_encoder_decoder=False, source_frame=Frame(lead, ()), target_frame=Frame(lead, ()))
    example = Example(token_ids, is_label, is_document=False)
    pieces = fitter.fit(example)
    if len(token_ids) > 8 and (num_labels + 1 + len(lead) > 8 or not num_prompt):
        assert pieces == []
        needed = fitter.num_tokens_needed(example)
        assert replace(fitter, seq_len=needed).fit(example) and not replace(fitter, seq_len=needed - 1).fit(example)
        return
    [piece] = pieces
    assert len(piece.token_ids) == min(8, len(token_ids))
    assert piece.token_ids[piece.is_label].tolist() == token_ids[is_label].tolist()
    assert tuple(piece.token_ids[: len(lead)]) == lead
    rest = piece.token_ids[len(lead) :]
    assert rest.tolist() == token_ids[len(token_ids) - len(rest) :].tolist()


def test_truncating_a_conversation_starts_in_a_prompt() -> None:
    is_label = np.asarray([0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1], bool)
    fitter = Fitter(seq_len=8, is_encoder_decoder=False, source_frame=Frame((), ()), target_frame=Frame((), ()))
    example = Example(np.arange(11, dtype=np.int32), is_label, is_document=False)
    [piece] = fitter.fit(example)
    assert piece.token_ids.tolist() == [6, 7, 8, 9, 10]
    assert fitter.num_tokens_needed(example) == 4


def test_a_completion_that_does_not_fit_is_left_out_though_a_prompt_follows_it() -> None:
    is_label = np.asarray([0, *[1] * 9, 0], bool)
    fitter = Fitter(seq_len=8, is_encoder_decoder=False, source_frame=Frame((), ()), target_frame=Frame((), ()))
    assert fitter.fit(Example(np.arange(11, dtype=np.int32), is_label, is_document=False)) == []


def test_what_was_left_out_is_counted(tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines) -> None:
    path = write_lines(
        {"text": "  "},
        {"prompt": "Two?", "completion": ""},
        {"prompt": "Two and two? " * 20, "completion": "four"},
        {"prompt": "Two?", "completion": "four " * 50},
        {"text": "The answer is four. " * 20},
        {"text": "four"},
    )
    summary = load_dataset(path, tokenizer, seq_len=16).summary
    assert (summary.num_records, summary.num_without_labels, summary.num_truncated) == (6, 2, 1)
    assert (summary.num_too_long, summary.num_split) == (1, 1)
    line = summary.describe()
    assert line.startswith("6 records, ") and "1 prompts truncated, 1 too long, left out, 2 with nothing" in line


def test_a_tokenizer_without_eos_leaves_documents_open_and_says_so(
    tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines({"text": "The sum is four."})
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None, raising=False)
    dataset = load_dataset(path, tokenizer, seq_len=64)
    assert texts(dataset, tokenizer) == [("", "The sum is four.")]
    assert "no EOS token" in dataset.summary.describe()


def test_progress_is_told_the_share_and_ends_at_one(
    tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "BATCH_RECORDS", 2)
    shares: list[float] = []
    load_dataset(write_lines(*[{"text": "four"}] * 5), tokenizer, seq_len=16, progress=shares.append)
    assert shares == [0.4, 0.8, 1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty, wanted at least one record"),
        ([{"text": ""}], "has nothing to predict: all 1 records"),
        ([{"prompt": "p", "completion": "x" * 40}], r"no example that fits seq_len 8: .* give --seq-len 42 or more"),
        ([{"text": "fine"}, {"body": "b"}], r"data\.jsonl:2 has the fields body"),
    ],
)
def test_nothing_to_train_on_says_why(
    rows: list[object], message: str, tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    with pytest.raises(IsthmusError, match=message):
        load_dataset(write_lines(*rows), tokenizer, seq_len=8)


def test_a_seq_len_that_is_too_small_is_refused(tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines) -> None:
    with pytest.raises(IsthmusError, match="seq_len: got 7, wanted at least 8"):
        load_dataset(write_lines({"text": "a"}), tokenizer, seq_len=7)


def test_a_saved_tokenizer_is_loaded_and_a_missing_one_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert loaded.eos_token == tokenizer.eos_token
    assert loaded("The sum")["input_ids"] == tokenizer("The sum")["input_ids"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(IsthmusError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(tmp_path / "empty")
