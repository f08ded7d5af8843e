"""Micro-batches hold every token once per epoch, count what they say, and go on exactly where they stopped."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.spec.errors import IsthmusError
from isthmus.tuning.data import IGNORED, BatchStream, MicroBatch, TokenDataset

SEQ_LEN = 16
MakeDataset = Callable[..., TokenDataset]
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), min_size=2, max_size=SEQ_LEN), min_size=1, max_size=30)


def documents_of(batch: MicroBatch) -> list[tuple[int, ...]]:
    """The documents of a packed micro-batch, padding left out, cut where position ids start again."""
    documents = []
    for ids, positions in zip(batch.inputs["input_ids"], batch.inputs["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            # No document of these tests has the padding token.
            if ids[start] != 0:
                documents.append(tuple(ids[start:end].tolist()))
    return documents


@settings(max_examples=50)
@given(documents=DOCUMENTS, seed=st.integers(0, 5))
def test_every_document_is_there_exactly_once_per_epoch(
    make_dataset: MakeDataset, documents: list[list[int]], seed: int
) -> None:
    stream = BatchStream(make_dataset(documents, SEQ_LEN), seed=seed)
    for epoch in range(2):
        batches = stream.next_step()
        assert stream.epoch == epoch
        batches += [batch for _ in range(stream.num_sequences - 1) for batch in stream.next_step()]
        seen = [document for batch in batches for document in documents_of(batch)]
        assert Counter(seen) == Counter(map(tuple, documents))
        assert sum(batch.num_tokens for batch in batches) == sum(map(len, documents))
        assert stream.fill_ratio == sum(map(len, documents)) / (SEQ_LEN * len(batches))


@settings(max_examples=50)
@given(documents=DOCUMENTS, num_prompt_tokens=st.integers(0, 1))
def test_labels_are_the_tokens_except_starts_prompts_and_padding(
    make_dataset: MakeDataset, documents: list[list[int]], num_prompt_tokens: int
) -> None:
    stream = BatchStream(make_dataset(documents, SEQ_LEN, num_prompt_tokens=num_prompt_tokens))
    for batch in (batch for step in stream.evaluation_batches() for batch in step):
        ids, positions, labels = (batch.inputs[name] for name in ("input_ids", "position_ids", "labels"))
        wanted = (positions > 0) & (ids != 0)
        assert torch.equal(labels, torch.where(wanted, ids, IGNORED))
        assert batch.num_label_tokens == int((labels[:, 1:] != IGNORED).sum()) > 0


def many(make_dataset: MakeDataset) -> TokenDataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, SEQ_LEN + 1, (40,), generator=generator).tolist()
    return make_dataset([torch.randint(1, 99, (n,), generator=generator).tolist() for n in lengths], SEQ_LEN)


def ids(steps: list[list[MicroBatch]]) -> list[list[list[list[int]]]]:
    return [[batch.inputs["input_ids"].tolist() for batch in step] for step in steps]


@pytest.mark.parametrize("num_steps_before", [0, 1, 4, 9])
def test_a_resumed_stream_gives_the_same_batches(make_dataset: MakeDataset, num_steps_before: int) -> None:
    dataset = many(make_dataset)
    stream = BatchStream(dataset, micro_batch_size=2, num_micro_batches=3, seed=7)
    for _ in range(num_steps_before):
        stream.next_step()
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = ids([stream.next_step() for _ in range(8)])
    resumed = BatchStream(dataset, micro_batch_size=2, num_micro_batches=3, seed=7)
    resumed.load_state_dict(state)
    assert ids([resumed.next_step() for _ in range(8)]) == wanted
    assert stream.epoch >= 1


def test_a_state_of_other_data_or_another_seed_is_refused(make_dataset: MakeDataset) -> None:
    state = BatchStream(many(make_dataset), seed=1).state_dict()
    with pytest.raises(IsthmusError, match="the checkpoint's seed is 1, this run's is 2"):
        BatchStream(many(make_dataset), seed=2).load_state_dict(state)
    with pytest.raises(IsthmusError, match=r"the checkpoint's dataset is .* resume with the same data"):
        BatchStream(make_dataset([[1, 2]], SEQ_LEN), seed=1).load_state_dict(state)


def test_peeking_and_evaluating_leave_the_stream_where_it_is(make_dataset: MakeDataset) -> None:
    dataset = many(make_dataset)
    stream, untouched = (BatchStream(dataset, micro_batch_size=2, num_micro_batches=2) for _ in range(2))
    for _ in range(10):
        peeked = stream.peek()
        stream.evaluation_batches(1)
        wanted = ids([untouched.next_step()])
        assert ids([peeked]) == wanted == ids([stream.next_step()])


def test_no_micro_batch_is_larger_than_the_largest(make_dataset: MakeDataset) -> None:
    documents = [[7] * length for length in (2, 9, 3, 5, 4, 8)]
    for is_encoder_decoder in (False, True):
        dataset = make_dataset(documents, 12, num_prompt_tokens=1, is_encoder_decoder=is_encoder_decoder)
        stream = BatchStream(dataset, micro_batch_size=2)
        largest = stream.largest()
        batches = [batch for _ in range(20) for batch in stream.next_step()]
        for name, value in largest.inputs.items():
            widths = [batch.inputs[name].shape[1] for batch in batches]
            assert value.shape == (2, max(widths)), name
        assert largest.num_computed_tokens == max(batch.num_computed_tokens for batch in batches)
        assert all(batch.num_tokens <= batch.num_computed_tokens for batch in batches)
        assert all(batch.inputs.keys() == largest.inputs.keys() for batch in batches)


def test_epochs_differ_in_order_and_seeds_too(make_dataset: MakeDataset) -> None:
    stream = BatchStream(many(make_dataset), seed=1)
    epochs = [ids([stream.next_step() for _ in range(stream.num_sequences)]) for _ in range(2)]
    other = BatchStream(many(make_dataset), seed=2)
    assert epochs[0] != epochs[1]
    assert ids([other.next_step() for _ in range(other.num_sequences)]) != epochs[0]


def test_evaluation_covers_the_data_once_and_is_the_same_each_time(make_dataset: MakeDataset) -> None:
    dataset = many(make_dataset)
    stream = BatchStream(dataset, micro_batch_size=3, num_micro_batches=2)
    steps = stream.evaluation_batches()
    stream.next_step()
    assert ids(stream.evaluation_batches()) == ids(steps)
    assert ids(stream.evaluation_batches(2)) == ids(steps[:2])
    seen = Counter(document for step in steps for batch in step for document in documents_of(batch))
    assert seen == Counter(tuple(dataset.example(number)[0].tolist()) for number in range(len(dataset)))


@pytest.mark.parametrize("field", ["micro_batch_size", "num_micro_batches", "seed"])
def test_counts_below_their_least_are_refused(make_dataset: MakeDataset, field: str) -> None:
    with pytest.raises(IsthmusError, match=f"{field}: got -1"):
        BatchStream(make_dataset([[1, 2]], SEQ_LEN), **{field: -1})
