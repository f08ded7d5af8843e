"""A device holds its share of a model, and not the pages of the file that it read it from; and computes in no more than
is estimated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.conftest import on_devices
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, BertConfig, LlamaConfig

import isthmus.models.decoupled.architectures  # noqa: F401  decoupled models register themselves
from isthmus.inference.engine import Engine
from isthmus.inference.model import LocalModel
from isthmus.inference.session import Arrangement
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import block_parts
from isthmus.planning.device_costs import working_bytes
from isthmus.planning.shares import divide_layer
from isthmus.planning.workload import device_shares
from isthmus.spec.inference import ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.transport.base import Group


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


@pytest.fixture(scope="module")
def decoupled_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide in proportion as BERT-base, so that what a layer has at once is in the same proportions."""
    directory = tmp_path_factory.mktemp("decoupled")
    size: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=256, num_attention_heads=4, num_hidden_layers=3, vocab_size=99
    )
    config = decoupled_config(BertConfig(**size), {"num_sub_blocks": 4, "original_layers": [1]})
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def live_bytes(engine: Engine, ids_BT: torch.Tensor, attended_BT: torch.Tensor) -> int:
    """The most that tensors take at once on the leader while it answers, beside what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.mean(ids_BT, attended_BT)
    live = most = 0
    profiler: Any = profiled.profiler
    for event in profiler.kineto_results.events():
        live += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, live)
    return most


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("way", ORIGINAL_PLANS)
def test_tensors_take_no_more_at_once_than_is_estimated(
    decoupled_bert: Path, way: str, num_devices: int, is_padded: bool
) -> None:
    """Also with layers in parts, as another plan wants them."""
    even = InferencePlan.even("block", num_devices)
    plans = (even,) if num_devices == 1 else (replace(even, originals=(way,)), replace(even, originals=("tensor",)))
    request = InferenceRequest(num_tokens=128, batch=4) if is_padded else InferenceRequest(num_tokens=512)
    ids_BT = torch.ones(request.batch, request.num_tokens, dtype=torch.int64)
    attended_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    attended_BT[0, -5:] = not is_padded

    def work(group: Group | None) -> tuple[int, int]:
        with Engine(decoupled_bert, arranged=Arrangement(group=group, plans=plans, is_frugal=True)) as engine:
            if not engine.is_leader:
                engine.follow()
                return 0, 0
            share, part = device_shares(plans[0], engine.spec)[0], block_parts(plans[0], engine.spec)[0]
            needed = working_bytes(
                engine.spec,
                share,
                request,
                num_devices,
                num_sub_blocks=len(part.sub_blocks),
                is_frugal=True,
            )
            engine.mean(ids_BT, attended_BT)
            return live_bytes(engine, ids_BT, attended_BT), needed

    live, estimated = work(None) if num_devices == 1 else on_devices(num_devices, work)[0]
    assert 0.2 * estimated < live <= estimated
