"""Tiny checkpoints of every family, and a plain loop over experts that reads its weights from units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from isthmus.models.config import load_config
from isthmus.models.moe_model import MoeModel, unit_views
from isthmus.models.reader import read_checkpoint
from isthmus.models.skeleton import torch_dtype
from isthmus.models.tiny import FAMILIES, write_tiny_checkpoint
from isthmus.spec.model import UnitKey


class Loaded:
    """A ``MoeModel`` with its weights in one flat tensor per unit, and the plain loop set as experts function."""

    def __init__(self, path: Path, dtype: str, num_layers: int | None = None) -> None:
        self.model = MoeModel.build(load_config(path, num_layers=num_layers), dtype)
        self.flats = {
            key: torch.full((layout.numel,), torch.nan, dtype=torch_dtype(layout.dtype))
            for key, layout in self.model.layouts.items()
        }
        read_checkpoint(path, self.model, self.unit)
        for key, flat in self.flats.items():
            if key.is_expert:
                flat.requires_grad_()
            else:
                self.model.bind(key, flat)
        self.model.set_experts_function(self.loop_over_experts)
        self.model.module.eval()

    def unit(self, key: UnitKey) -> dict[str, torch.Tensor]:
        return unit_views(self.model.layouts[key], self.flats[key])

    def loop_over_experts(
        self, layer: int, experts: nn.Module, hidden_TH: torch.Tensor, index_Tk: torch.Tensor, weights_Tk: torch.Tensor
    ) -> torch.Tensor:
        spec = self.model.spec.layers[layer]
        assert spec is not None and index_Tk.dtype == torch.int64
        assert ((index_Tk >= 0) & (index_Tk <= spec.num_experts)).all()
        out_TH = torch.zeros_like(hidden_TH)
        for expert in range(spec.num_experts):
            token, choice = torch.where(index_Tk == expert)
            if not len(token):
                continue
            tensors = self.unit(UnitKey(layer, expert))
            inner = _linear(
                hidden_TH[token], "gate_up_proj" if spec.has_gate else "up_proj", tensors, spec.is_transposed
            )
            inner = experts._apply_gate(inner) if spec.has_gate else experts.act_fn(inner)  # pyright: ignore
            part = _linear(inner, "down_proj", tensors, spec.is_transposed) * weights_Tk[token, choice, None]
            out_TH = out_TH.index_add(0, token, part.to(out_TH.dtype))
        return out_TH

    def forward(self, batch: dict[str, torch.Tensor], **arguments: object):
        return self.model.module(**batch, **self.model.forward_arguments(), **arguments)


def _linear(x: torch.Tensor, name: str, tensors: dict[str, torch.Tensor], is_transposed: bool) -> torch.Tensor:
    weight, bias = tensors[name], tensors.get(f"{name}_bias")
    if not is_transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


def _nllb_sum(self: NllbMoeExperts, hidden_TH: torch.Tensor, mask: torch.Tensor, probabilities_TE: torch.Tensor):
    """Σ_e p_e · expert_e(x): what transformers' own forward of these experts gets wrong."""
    experts = [self[f"expert_{expert}"] for expert in range(self.num_experts)]
    return sum(probabilities_TE[:, e, None] * expert(hidden_TH) for e, expert in enumerate(experts))


def plain_transformers(path: Path, dtype: str = "fp32") -> PreTrainedModel:
    config = load_config(path)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Switch and NLLB-MoE have no choice of experts implementation.
    eager = {} if config.is_encoder_decoder else {"experts_implementation": "eager"}
    module = auto_class.from_pretrained(path, dtype=torch_dtype(dtype), **eager)
    for child in module.modules():
        if isinstance(child, NllbMoeExperts):
            child.forward = _nllb_sum.__get__(child)
    return module.eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(family, dtype)``: the directory of a tiny checkpoint, written once. Do not change it."""
    written: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str = "fp32") -> Path:
        if (family, dtype) not in written:
            path = tmp_path_factory.mktemp(family)
            write_tiny_checkpoint(family, path, seed=0, dtype=dtype)
            written[family, dtype] = path
        return written[family, dtype]

    return get


@pytest.fixture(scope="session")
def load() -> Callable[..., Loaded]:
    return Loaded


@pytest.fixture(scope="session")
def reference() -> Callable[..., PreTrainedModel]:
    return plain_transformers


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """2 sequences of 12 tokens; with labels, which an encoder-decoder also derives its decoder's input from."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (2, 12), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}
