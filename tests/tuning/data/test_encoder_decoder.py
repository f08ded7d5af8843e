"""Encoder–decoder models: prompts are sources, completions targets, and padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from isthmus.data import train_tokenizer
from isthmus.models.tiny import tiny_config
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data import IGNORED, BatchStream, MicroBatch, TokenDataset, load_dataset

WriteLines = Callable[..., Path]


@pytest.fixture(scope="module")
def framed_tokenizer() -> PreTrainedTokenizerFast:
    """Puts padding (standing for a language) before and EOS after each text, as NLLB's tokenizer does."""
    tokenizer = train_tokenizer(["What is the sum of two and two? The answer is four."], 300)
    backend = tokenizer.backend_tokenizer
    lead, end = str(tokenizer.pad_token), str(tokenizer.eos_token)
    vocabulary = tokenizer.get_vocab()
    special = [(token, vocabulary[token]) for token in (lead, end)]
    backend.post_processor = TemplateProcessing(single=[lead, "$A", end], special_tokens=special)
    return tokenizer


def pairs(dataset: TokenDataset, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    return [
        (str(tokenizer.decode(token_ids[~is_label])), str(tokenizer.decode(token_ids[is_label])))
        for token_ids, is_label in map(dataset.example, range(len(dataset)))
    ]


def test_prompts_are_sources_and_completions_targets(
    tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    path = write_lines({"prompt": "two and two?", "completion": "four"}, {"prompt": "", "completion": "two"})
    dataset = load_dataset(path, tokenizer, seq_len=32, is_encoder_decoder=True)
    end = "<|endoftext|>"
    assert pairs(dataset, tokenizer) == [("two and two?" + end, "four" + end), (end, "two" + end)]
    assert dataset.summary.num_truncated == 0


def test_frames_of_the_tokenizer_stay_whole_when_the_source_is_cut(
    framed_tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    path = write_lines({"prompt": "xyz" * 10 + "ABCDEF", "completion": "GHI"}, {"prompt": "x", "completion": "y" * 7})
    dataset = load_dataset(path, framed_tokenizer, seq_len=8, is_encoder_decoder=True)
    lead, end = "<|padding|>", "<|endoftext|>"
    assert pairs(dataset, framed_tokenizer) == [(f"{lead}ABCDEF{end}", f"{lead}GHI{end}")]
    assert (dataset.summary.num_truncated, dataset.summary.num_too_long) == (1, 1)


def test_the_first_half_of_each_piece_of_a_text_predicts_the_second(
    framed_tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    dataset = load_dataset(
        write_lines({"text": "ABCDEFGHIJKLMNOPQ"}), framed_tokenizer, seq_len=8, is_encoder_decoder=True
    )
    bare = [
        tuple(part.removeprefix("<|padding|>").removesuffix("<|endoftext|>") for part in pair)
        for pair in pairs(dataset, framed_tokenizer)
    ]
    assert bare == [("ABCDEF", "GHIJKL"), ("MN", "OPQ")]
    assert dataset.summary.num_split == 1


def test_decoders_keep_bos_when_the_prompt_is_cut(
    framed_tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    dataset = load_dataset(write_lines({"prompt": "xyzABC ", "completion": "GHI"}), framed_tokenizer, seq_len=8)
    assert pairs(dataset, framed_tokenizer) == [("<|padding|>BC ", "GHI<|endoftext|>")]


def test_every_completion_too_long_says_what_would_do(
    framed_tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    path = write_lines({"prompt": "x", "completion": "ABCDEFGHIJ"})
    with pytest.raises(IsthmusError, match="give --seq-len 12 or more"):
        load_dataset(path, framed_tokenizer, seq_len=8, is_encoder_decoder=True)
    assert len(load_dataset(path, framed_tokenizer, seq_len=12, is_encoder_decoder=True)) == 1


def padded_batch(make_dataset: Callable[..., TokenDataset], size: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (5, 12, 9)]
    dataset = make_dataset(documents, 32, num_prompt_tokens=4, is_encoder_decoder=True)
    return [batch for step in BatchStream(dataset, micro_batch_size=size).evaluation_batches() for batch in step]


def test_padded_batches_hold_every_pair_once(make_dataset: Callable[..., TokenDataset]) -> None:
    [together], alone = padded_batch(make_dataset, 3), padded_batch(make_dataset, 1)
    assert together.num_tokens == sum(batch.num_tokens for batch in alone) == 26
    assert together.num_label_tokens == sum(batch.num_label_tokens for batch in alone) == 14
    for row, batch in enumerate(alone):
        for name, values in batch.inputs.items():
            length = values.shape[1]
            assert torch.equal(together.inputs[name][row, :length], values[0])
            padding = IGNORED if name == "labels" else 0
            assert (together.inputs[name][row, length:] == padding).all()


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
@torch.no_grad()
def test_padding_does_not_change_the_loss(family: str, make_dataset: Callable[..., TokenDataset]) -> None:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(tiny_config(family, decoder_start_token_id=0)).eval()
    [together], alone = padded_batch(make_dataset, 3), padded_batch(make_dataset, 1)
    losses = [model(**batch.inputs, use_cache=False).loss * batch.num_label_tokens for batch in alone]
    loss = model(**together.inputs, use_cache=False).loss
    torch.testing.assert_close(loss, sum(losses, torch.zeros(())) / together.num_label_tokens, rtol=1e-5, atol=0)
