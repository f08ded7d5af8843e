"""A model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from isthmus.spec.errors import IsthmusError


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model in ``model_dir``.

    Raises ``IsthmusError`` if there is none or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(model_dir))
    except (OSError, ValueError, KeyError) as error:
        raise IsthmusError(
            f"tokenizer: {model_dir} holds no tokenizer that can be loaded ({str(error).splitlines()[0]}); "
            "copy tokenizer.json and tokenizer_config.json of the model there"
        ) from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to fill up with: padding has no labels and no text sees it, so any token will do where there is none for
    it."""
    token_ids: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return int(next(token_id for token_id in token_ids if token_id is not None))
