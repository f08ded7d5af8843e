"""A small tokenizer, and data sets from token lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.data import train_tokenizer
from isthmus.tuning.data import LoadSummary, TokenDataset

MakeDataset = Callable[..., TokenDataset]


@pytest.fixture(scope="session")
def trained_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        ["What is the sum of two and two? The answer is four.\n", "def add(a, b):\n    return a + b\n"], 320
    )


@pytest.fixture
def tokenizer(trained_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The trained one, without what a test may have set on it."""
    trained_tokenizer.chat_template = None
    return trained_tokenizer


@pytest.fixture(scope="session")
def make_dataset() -> MakeDataset:
    """A data set of the given documents (lists of token ids), to predict from token ``num_prompt_tokens`` on."""

    def make(
        documents: Sequence[Sequence[int]],
        seq_len: int,
        *,
        num_prompt_tokens: int = 0,
        is_encoder_decoder: bool = False,
    ) -> TokenDataset:
        lengths = [len(document) for document in documents]
        token_ids = np.asarray([token for document in documents for token in document], np.int32)
        is_label = np.concatenate([np.arange(length) >= num_prompt_tokens for length in lengths])
        return TokenDataset(
            token_ids=token_ids,
            is_label=is_label,
            offsets=np.cumsum([0, *lengths]),
            seq_len=seq_len,
            pad_token_id=0,
            is_encoder_decoder=is_encoder_decoder,
            summary=LoadSummary(
                num_records=len(documents),
                num_examples=len(documents),
                num_tokens=len(token_ids),
                num_label_tokens=int(is_label.sum()),
                num_split=0,
                num_truncated=0,
                num_too_long=0,
                num_without_labels=0,
            ),
        )

    return make
