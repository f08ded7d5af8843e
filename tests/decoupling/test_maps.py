"""Maps begin as nothing, are trained beside the copy, and leave a plain table behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.decoupling.conftest import sentences, tokenizer
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from isthmus.decoupling.distillation import Distiller
from isthmus.decoupling.maps import MappedWords, map_words, merge_words
from isthmus.decoupling.pair import Wanted, open_source


def encoded(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 35).view(3, 10)).last_hidden_state


def tiny() -> Any:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    ).eval()


def test_a_new_map_changes_nothing() -> None:
    model = tiny()
    before = encoded(model)
    map_words(model)
    assert isinstance(model.get_input_embeddings(), MappedWords)
    torch.testing.assert_close(encoded(model), before)


def test_a_merged_table_computes_what_the_map_did() -> None:
    model = tiny()
    map_words(model)
    words: Any = model.get_input_embeddings()
    nn.init.normal_(words.map.weight, std=0.3)
    mapped = encoded(model)
    merge_words(model)
    assert type(model.get_input_embeddings()) is nn.Embedding
    torch.testing.assert_close(encoded(model), mapped)


def test_a_table_that_a_head_shares_is_left_alone() -> None:
    model = BertForMaskedLM(tiny().config)
    map_words(model)
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_maps_are_compared_through_and_learn(encoder: Path) -> None:
    """The loss reaches the maps of all layers but the last, and the map of words, but no table."""
    source = open_source(encoder)
    original = source.load()
    decoupled = source.decoupled(original, Wanted(sub_blocks=2, groups=1).config(source.config))
    distiller = Distiller(original, decoupled, dtype="fp32")
    batch = dict(tokenizer()(sentences(4), padding=True, return_tensors="pt"))
    distiller.loss(batch).backward()
    words: Any = decoupled.get_input_embeddings()
    assert len(distiller.maps) == 2 and words.table.weight.grad is None
    maps: Any = (*distiller.maps, words.map)
    for each in maps:
        assert each.weight.grad.abs().max() > 0
    before = distiller.loss(batch).item()
    with torch.no_grad():
        maps[0].weight.zero_()
    assert distiller.loss(batch).item() > before
