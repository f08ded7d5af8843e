"""The demo's text is whole files in a fixed order, and its tokenizer loses nothing."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from isthmus.data import load_tokenizer, standard_library_text, train_tokenizer
from isthmus.spec.errors import IsthmusError


def test_standard_library_text_is_whole_files_below_the_limit_and_the_same_each_time() -> None:
    documents = standard_library_text(200_000)
    assert documents == standard_library_text(200_000)
    assert 150_000 < sum(len(text.encode()) for text in documents) <= 200_000
    for text in documents:
        ast.parse(text)


def test_a_limit_below_every_file_is_refused() -> None:
    with pytest.raises(IsthmusError, match="max_bytes: got 3"):
        standard_library_text(3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def add(a, b):\n    return a + b\n"] * 3, 300)


@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if "<|" not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_merges_and_is_deterministic_and_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    assert train_tokenizer(["def add(a, b):\n    return a + b\n"] * 3, 300).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer("return return")["input_ids"]) < len("return return")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|padding|>")


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(IsthmusError, match="vocab_size: got 257, wanted at least 259"):
        train_tokenizer(["a"], 257)
