"""Real data: GSM8K's questions and answers come through whole and pack well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from isthmus.data import train_tokenizer
from isthmus.tuning.data import IGNORED, BatchStream, TokenDataset, load_dataset

NUM_RECORDS = 1500


@pytest.fixture(scope="module")
def records(shared: Path) -> list[dict[str, str]]:
    path = shared / "data" / "gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with path.open() as lines:
        return [json.loads(line) for line, _ in zip(lines, range(NUM_RECORDS), strict=False)]


@pytest.fixture(scope="module")
def tokenizer(records: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    return train_tokenizer((record["question"] + record["answer"] for record in records), 2048)


@pytest.fixture(scope="module")
def dataset(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> TokenDataset:
    path = tmp_path_factory.mktemp("gsm8k") / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_dataset(path, tokenizer, seq_len=512, columns="question,answer")


def test_labels_decode_to_the_answers_and_the_rest_to_the_questions(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, dataset: TokenDataset
) -> None:
    assert len(dataset) == len(records) and dataset.summary.num_truncated == 0
    for number, record in enumerate(records):
        token_ids, is_label = dataset.example(number)
        assert tokenizer.decode(token_ids[is_label]) == record["answer"] + "<|endoftext|>"
        assert str(tokenizer.decode(token_ids[~is_label])).rstrip("\n") == record["question"].rstrip("\n")


def test_one_epoch_asks_for_every_answer_once_and_little_is_padding(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, dataset: TokenDataset
) -> None:
    stream = BatchStream(dataset, micro_batch_size=2, seed=3)
    assert stream.fill_ratio > 0.95
    batches = [batch for step in stream.evaluation_batches() for batch in step]
    labels = [batch.inputs["labels"][batch.inputs["labels"] != IGNORED] for batch in batches]
    answers = [answer for part in labels for answer in str(tokenizer.decode(part)).split("<|endoftext|>")[:-1]]
    assert sorted(answers) == sorted(record["answer"] for record in records)
    assert sum(batch.num_tokens for batch in batches) == dataset.summary.num_tokens
    assert sum(batch.num_label_tokens for batch in batches) == dataset.summary.num_label_tokens
