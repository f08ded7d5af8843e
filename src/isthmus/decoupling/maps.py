"""Linear maps that leave a copy free to keep what it knows in another basis than the original's.

A sub-block sees its slice only, and what the original keeps in one place a copy may want in several. Two maps, which
begin as the identity, allow that and cost nothing in the end: one turns the vector of every word into the one that the
copy looks up (merged into its table, ``merge_words``), and one a layer turns the copy's hidden states into what is
compared with the original's (thrown away, as in TinyBERT, Jiao et al. 2020, section 3.1). Being maps of all words, not
rows of a table, they hold for words that are in no text, too.

Shapes: V words, H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def identity_map(size: int) -> nn.Linear:
    """A linear map (size → size) that changes nothing yet."""
    linear = nn.Linear(size, size, bias=False)
    nn.init.eye_(linear.weight)
    return linear


class MappedWords(nn.Module):
    """A table (V, H) that stays as it is, and one map of all its rows that is trained."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.map = table, identity_map(table.embedding_dim)
        table.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """Of the table: what asks an embedding for its dtype or device asks for this."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.map(self.table(ids))

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """The table, its rows mapped."""
        self.table.weight.copy_(self.map(self.table.weight))
        return self.table


def map_words(model: PreTrainedModel) -> None:
    """Puts a map behind the table of ``model``'s words, unless a head shares the table."""
    if model.get_output_embeddings() is None:
        table: Any = model.get_input_embeddings()
        model.set_input_embeddings(MappedWords(table).to(table.weight.device))


def merge_words(model: PreTrainedModel) -> None:
    """Undoes ``map_words``: ``model`` computes what it did, up to rounding, with a plain table again."""
    words = model.get_input_embeddings()
    if isinstance(words, MappedWords):
        model.set_input_embeddings(words.merged())
