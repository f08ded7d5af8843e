"""Tiny checkpoints of every family that can be divided among devices, and devices that are threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from isthmus.transport.local import LocalGroup, create_local_groups

Result = TypeVar("Result")

_SMALL: dict[str, Any] = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
)
_LLAMA: dict[str, Any] = _SMALL | dict(num_key_value_heads=2, max_position_embeddings=256)
_SCALED_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**_SMALL),
    "roberta": lambda: RobertaConfig(**_SMALL, pad_token_id=1),
    "distilbert": lambda: DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
    "gpt2": lambda: GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "llama": lambda: LlamaConfig(**_LLAMA, rope_parameters=_SCALED_ROPE, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=16),
}
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


@cache
def reference(family: str) -> PreTrainedModel:
    """The family's tiny model in plain transformers, with weights of real spread (norms and biases too)."""
    config = CONFIGS[family]()
    kind = AutoModelForCausalLM if family in DECODERS else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a directory with its tiny model."""

    @cache
    def write(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        reference(family).save_pretrained(directory)
        return directory

    return write


def add_tokenizer(directory: Path) -> Path:
    """Writes a tokenizer of ten words beside the tiny encoder in ``directory``, which is returned."""
    words = ["[PAD]", "[CLS]", "[SEP]", "one", "two", "three", "four", "five", "six", "seven"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(directory)
    return directory


def on_devices(num_devices: int, work: Callable[[LocalGroup], Result], *, timeout_s: float = 30.0) -> list[Result]:
    """What ``work`` returns on each of so many devices, which are threads. Raises the first error."""
    groups = create_local_groups(num_devices, timeout_s=timeout_s)

    def run(group: LocalGroup) -> Result:
        with group, torch.inference_mode():
            return work(group)

    with ThreadPoolExecutor(num_devices) as pool:
        futures = [pool.submit(run, group) for group in groups]
        return [future.result() for future in futures]
