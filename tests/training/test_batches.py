"""Batches without end: every text once an epoch, exact continuation, texts crossed with one another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.spec.errors import IsthmusError
from isthmus.training.batches import BatchStream, crossed, replaced

PAD, FIRST, LAST = 0, 1, 2


def texts_of(num: int, seed: int = 0) -> list[np.ndarray]:
    """Texts of 3 to 12 tokens between a first and a last one; no other token is in two texts."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 11, num)
    starts = 10 + np.concatenate([[0], np.cumsum(lengths)])
    return [
        np.array([FIRST, *range(start, start + length), LAST]) for start, length in zip(starts, lengths, strict=False)
    ]


def stream_of(texts: list[np.ndarray], **options: float) -> BatchStream:
    defaults = {"tokens_per_batch": 48, "pad_token_id": PAD, "seed": 3}
    return BatchStream(texts, **(defaults | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("shares", [{}, {"crossed_share": 0.7, "replaced_share": 0.2}], ids=["plain", "varied"])
def test_each_text_comes_once_an_epoch(shares: dict[str, float]):
    texts, seen = texts_of(60), 0
    stream = stream_of(texts, **shares)
    while seen < len(texts):
        batch = stream.next()
        assert batch["input_ids"].numel() <= 48 or len(batch["input_ids"]) == 1
        seen += len(batch["input_ids"])
    assert seen == len(texts) and stream.state()["epoch"] == 0
    stream.next()
    assert stream.state()["epoch"] == 1


@pytest.mark.parametrize("shares", [{}, {"crossed_share": 0.7, "replaced_share": 0.2}], ids=["plain", "varied"])
def test_goes_on_with_the_very_next_batch(shares: dict[str, float]):
    texts = texts_of(60)
    whole = stream_of(texts, **shares)
    for _ in range(17):
        whole.next()
    resumed = stream_of(texts, **shares)
    resumed.restore(whole.state())
    for _ in range(20):
        ours, theirs = resumed.next(), whole.next()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_share_an_epochs_texts():
    texts = texts_of(60)
    both = [stream_of(texts, part=part, num_parts=2) for part in range(2)]
    seen: list[int] = []
    while both[0].state()["position"] + 2 <= len(both[0]._batches):
        for stream in both:
            ids = stream.next()["input_ids"]
            seen += ids[ids > LAST].tolist()
    assert len(seen) == len(set(seen))


def test_refuses_the_state_of_another_run():
    with pytest.raises(IsthmusError, match="resume: the checkpoint is of 60 texts and seed 3, this run of 59 and 3"):
        stream_of(texts_of(60)[:59]).restore(stream_of(texts_of(60)).state())


@settings(max_examples=100, deadline=None)
@given(num=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_crossed_texts_begin_as_one_and_end_as_another(num: int, share: float, seed: int):
    texts = texts_of(num, seed)
    result = crossed(texts, share, np.random.default_rng(seed))
    assert len(result) == num
    ends = {text.tobytes(): text for text in texts}
    for text, new in zip(texts, result, strict=True):
        same = next((k for k in range(min(len(text), len(new))) if text[k] != new[k]), min(len(text), len(new)))
        assert same >= 1, "the beginning is the text's own"
        assert (new[0], new[-1]) == (FIRST, LAST) and (new != PAD).all()
        # What follows is the rest of one text, at the places it has there.
        assert any(len(rest) == len(new) and (rest[same:] == new[same:]).all() for rest in ends.values())


def test_the_share_is_about_what_was_asked():
    texts = texts_of(2000)
    result = crossed(texts, 0.5, np.random.default_rng(0))
    changed = sum(not np.array_equal(text, new) for text, new in zip(texts, result, strict=True))
    assert 0.3 < changed / 2000 < 0.55  # a rest of the last token alone changes nothing where lengths agree
    assert all(new is text for text, new in zip(texts, crossed(texts, 0.0, np.random.default_rng(0)), strict=True))


@settings(max_examples=50, deadline=None)
@given(num=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_replaced_tokens_are_others_of_the_batch_and_ends_stay(num: int, share: float, seed: int):
    texts = texts_of(num, seed)
    before = [text.copy() for text in texts]
    result = replaced(texts, share, np.random.default_rng(seed))
    inner = {token for text in texts for token in text[1:-1]}
    for text, old, new in zip(texts, before, result, strict=True):
        assert (text == old).all(), "the text itself is left as it was"
        assert (len(new), new[0], new[-1]) == (len(text), FIRST, LAST)
        assert set(new[1:-1]) <= inner


def test_about_the_share_that_was_asked_is_replaced():
    texts = texts_of(2000)
    result = replaced(texts, 0.2, np.random.default_rng(0))
    changed = sum(int((text != new).sum()) for text, new in zip(texts, result, strict=True))
    assert changed / sum(len(text) - 2 for text in texts) == pytest.approx(0.2, abs=0.02)


def test_replacing_in_pairs_leaves_token_types():
    texts = [np.stack([np.arange(10, 16) + 10 * k, np.full(6, k)]) for k in range(2)]
    result = replaced(texts, 1.0, np.random.default_rng(0))
    assert all((text[1] == new[1]).all() for text, new in zip(texts, result, strict=True))
    assert any((text[0] != new[0]).any() for text, new in zip(texts, result, strict=True))


def test_pairs_keep_their_token_types():
    texts = [np.stack([np.arange(10, 16) + 10 * k, np.full(6, k)]) for k in range(2)]
    for seed in range(10):
        for text in crossed(texts, 1.0, np.random.default_rng(seed)):
            assert ((text[0] // 10 - 1) == text[1]).all()
