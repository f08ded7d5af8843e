"""The change of basis: it changes nothing that the model computes, and slices see more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.decoupled.conftest import tiny, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from isthmus.decoupling.basis import change_basis, dealt, shared_basis, wants_shared
from isthmus.decoupling.run import decouple
from isthmus.spec.errors import IsthmusError

FREE = ("llama", "mistral", "qwen2", "qwen3")


def model_of(family: str, **changes: Any) -> Any:
    config = tiny(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are not constant
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("family", FREE)
def test_a_model_computes_the_same_in_another_basis(family: str, is_tied: bool) -> None:
    model = model_of(family, tie_word_embeddings=is_tied)
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
        basis, _ = torch.linalg.qr(torch.randn(32, 32))
        change_basis(model, basis)
        after = model(input_ids=tokens()).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("widths", [(4, 4), (3, 3, 3), (2, 2, 2, 2), (5, 2, 1), (1, 6)])
def test_what_is_dealt_is_orthogonal_and_everyone_gets_of_the_strongest(widths: tuple[int, ...]) -> None:
    mixing = dealt(widths)
    torch.testing.assert_close(mixing @ mixing.T, torch.eye(sum(widths)), atol=1e-5, rtol=0)
    firsts = [sum(widths[:place]) for place in range(len(widths))]
    torch.testing.assert_close(mixing[0, firsts], torch.full((len(widths),), len(widths) ** -0.5))


def explained(states: torch.Tensor, width: int) -> float:
    """Mean share of all units' variance that is a linear function of one slice."""
    shares = []
    for start in range(0, states.shape[1], width):
        part = states[:, start : start + width]
        rest = states - part @ torch.linalg.lstsq(part, states).solution
        shares.append(1 - float(rest.square().sum() / states.square().sum()))
    return sum(shares) / len(shares)


def test_slices_see_more_in_the_shared_basis() -> None:
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, 32)
    turned, _ = torch.linalg.qr(torch.randn(32, 32))
    states = torch.randn(4000, 32) * scales @ turned.T
    components = torch.linalg.eigh(states.T @ states)[1].flip(1)
    as_they_are, shared = explained(states, 8), explained(states @ components @ dealt((8,) * 4), 8)
    strongest = float(scales[:8].square().sum() / scales.square().sum())
    assert shared > as_they_are + 0.05 and shared > 0.9 * strongest
    assert shared > explained(states @ components, 8) + 0.3  # components themselves tell nothing of each other


def test_the_basis_comes_from_what_the_layers_read() -> None:
    model = model_of("llama")
    batches = [{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}]
    basis = shared_basis(model, (8,) * 4, (0, 1), batches)
    torch.testing.assert_close(basis.T @ basis, torch.eye(32), atol=1e-4, rtol=0)


def test_who_may_and_who_wants() -> None:
    assert wants_shared("auto", model_of("llama")) and not wants_shared("kept", model_of("llama"))
    tied = model_of("llama", tie_word_embeddings=True)
    assert not wants_shared("auto", tied) and wants_shared("shared", tied)
    assert not wants_shared("auto", model_of("gpt2"))
    with pytest.raises(IsthmusError, match=r"basis: shared needs a language model with RMSNorm .* a GPT2LMHeadModel"):
        wants_shared("shared", model_of("gpt2"))


def test_a_run_in_the_shared_basis_loads_and_resumes(decoder: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": [text], "seq_len": 32, "dtype": "fp32", "device": "cpu", "plain": True}
    options |= {"sub_blocks": 2, "batch_tokens": 256, "basis": "shared"}
    whole = decouple(decoder, output=tmp_path / "whole", steps=6, **options)
    decouple(decoder, output=tmp_path / "parts", steps=3, **options)
    assert (tmp_path / "parts" / "checkpoints" / "basis.safetensors").is_file()
    parts = decouple(decoder, output=tmp_path / "parts", steps=6, resume=True, **options)
    assert whole is not None and parts is not None
    original = LlamaForCausalLM.from_pretrained(decoder).eval()
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert copy.lm_head.weight is not copy.model.embed_tokens.weight
    assert whole.curve[0].original_loss == pytest.approx(parts.curve[0].original_loss, rel=1e-5)
    with torch.no_grad():
        ids = torch.arange(5, 20)[None]
        theirs, ours = original(input_ids=ids).logits, copy(input_ids=ids).logits
    assert torch.corrcoef(torch.stack([theirs.flatten(), ours.flatten()]))[0, 1] > 0.5
