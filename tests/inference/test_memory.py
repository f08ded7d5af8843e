"""A device holds its share of a model, and not the pages of the file that it read it from."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, LlamaConfig

from isthmus.inference.model import LocalModel
from isthmus.models.shards import ShardReader
from isthmus.planning.shares import divide_layer


def mapped_bytes() -> int:
    """Resident pages of this process that belong to files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024


def test_what_was_read_does_not_stay_mapped(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    reader = ShardReader(tmp_path)
    share = divide_layer(reader.spec, (1.0,) * 4)[0]
    LocalModel(ShardReader(tmp_path), share, "fp32")  # brings the libraries' own pages
    before_bytes = mapped_bytes()
    model = LocalModel(reader, share, "fp32")
    assert model.num_bytes < 0.26 * file_bytes
    assert mapped_bytes() - before_bytes < 0.1 * file_bytes


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    """A view of the file would keep it mapped."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    reader = ShardReader(tmp_path)
    for name, layer in (("q.weight", 0), ("norm1.weight", 0), ("final_norm.weight", None)):
        first, second = reader.read(name, layer), reader.read(name, layer)
        assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
