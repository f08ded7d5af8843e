"""Real text and a tokenizer without a download: the standard library's source, and a byte-level BPE trained on it."""

from __future__ import annotations

import random
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from isthmus.spec.errors import IsthmusError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MASK = "<|mask|>"
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def standard_library_text(max_bytes: int) -> list[str]:
    """Source files of the running Python's standard library, tests left out, together at most ``max_bytes`` of UTF-8.

    Whole files, in an order that is random but always the same for one Python version, so that any few are a fair
    sample; files that would exceed the limit are passed over. Raises ``IsthmusError`` if nothing is left.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    documents = []
    num_bytes_left = max_bytes
    for path in paths:
        with tokenize.open(path) as file:
            text = file.read()
        num_bytes = len(text.encode())
        if 0 < num_bytes <= num_bytes_left:
            documents.append(text)
            num_bytes_left -= num_bytes
    if not documents:
        raise IsthmusError(
            f"max_bytes: got {max_bytes}, and none of the {len(paths)} source files below {root} is that small; "
            "give 1000000 or more"
        )
    return documents


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens: any text is encoded, and decodes to itself.

    256 bytes, end of text (EOS), padding and mask, the rest merges. The same texts give the same tokenizer. Blocks (2 s
    for 8,000 merges of 12 MB). Raises ``IsthmusError`` if ``vocab_size`` does not even hold the bytes.
    """
    special = [END_OF_TEXT, PADDING, MASK]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise IsthmusError(
            f"vocab_size: got {vocab_size}, wanted at least {len(alphabet) + len(special)} (the bytes, and {special})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
