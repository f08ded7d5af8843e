"""Loading a model's tokenizer."""

from __future__ import annotations

from pathlib import Path

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
