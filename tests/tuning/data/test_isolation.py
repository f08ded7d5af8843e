"""Packed documents do not see one another, in every decoder family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from isthmus.models.tiny import tiny_config
from isthmus.tuning.data import BatchStream, MicroBatch, TokenDataset, keep_documents_apart

LENGTHS = (9, 14, 2, 6, 21, 8)
SLIDING: dict[str, object] = {"sliding_window": 4}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, sliding": ("mixtral", SLIDING),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, sliding": ("qwen2_moe", {**SLIDING, "use_sliding_window": True, "max_window_layers": 3}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, sliding": ("qwen3_moe", {**SLIDING, "use_sliding_window": True}),
    "olmoe": ("olmoe", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss, sliding": ("gpt_oss", SLIDING),
}


def build(case: str) -> PreTrainedModel:
    family, overrides = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    # Wide enough weights that what a token sees shows in its logits.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def batch(make_dataset: Callable[..., TokenDataset]) -> MicroBatch:
    """Two sequences of 32 tokens: 60 tokens in six documents, and padding."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    [batch] = BatchStream(make_dataset(documents, 32, num_prompt_tokens=1), micro_batch_size=2).next_step()
    assert batch.num_tokens == sum(LENGTHS) and batch.inputs["input_ids"].shape == (2, 32)
    return batch


def slices(batch: MicroBatch) -> Iterator[tuple[int, slice]]:
    for row, positions in enumerate(batch.inputs["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        yield from ((row, slice(start, end)) for start, end in itertools.pairwise(starts))


@torch.no_grad()
def alone_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    logits = torch.empty(*batch.inputs["input_ids"].shape, model.config.vocab_size)
    for row, where in slices(batch):
        logits[row, where] = model(input_ids=batch.inputs["input_ids"][row : row + 1, where], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_of_packed_documents_are_those_of_each_alone(case: str, batch: MicroBatch) -> None:
    model = build(case)
    handle = keep_documents_apart(model)
    packed = model(**batch.inputs, use_cache=False).logits
    alone = alone_logits(model, batch)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    # The comparison can tell: the same tokens as one document give other logits.
    mixed = model(input_ids=batch.inputs["input_ids"], use_cache=False).logits
    assert (mixed - alone).abs().max() > 1e-2
    assert (handle is not None) == (model.config.model_type == "gpt_oss")


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss, sliding"])
@torch.no_grad()
def test_the_loss_is_the_mean_over_the_label_tokens_of_each_document_alone(case: str, batch: MicroBatch) -> None:
    model = build(case)
    keep_documents_apart(model)
    total = torch.zeros(())
    for row, where in slices(batch):
        ids, labels = (batch.inputs[name][row : row + 1, where] for name in ("input_ids", "labels"))
        if (labels != -100).any():
            total += model(input_ids=ids, labels=labels, use_cache=False).loss * (labels != -100).sum()
    loss = model(**batch.inputs, use_cache=False).loss
    torch.testing.assert_close(loss, total / batch.num_label_tokens, rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_added_masks_leave_the_auxiliary_loss_and_other_calls_alone(batch: MicroBatch) -> None:
    model = build("gpt_oss, sliding")
    arguments = {"input_ids": batch.inputs["input_ids"], "use_cache": False}
    before = model(**arguments).logits
    handle = keep_documents_apart(model)
    assert handle is not None
    assert torch.equal(model(**arguments).logits, before)
    assert torch.isfinite(model(**batch.inputs, output_router_logits=True, use_cache=False).aux_loss)
    handle.remove()
    mixed = model(**batch.inputs, use_cache=False).logits
    # When this fails, transformers looks at the position ids by itself and the hook can go.
    assert (mixed - alone_logits(model, batch)).abs().max() > 1e-2
