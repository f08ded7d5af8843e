"""Where a model's files are: a directory, or a Hugging Face id that is downloaded; which of them hold the weights."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NUM_NAMED = 5


def resolve_checkpoint(model: str | Path) -> Path:
    """The directory with the checkpoint: ``model`` itself, or where a Hugging Face id was downloaded to (blocks on
    the network).

    Raises ``FileNotFoundError`` if there is neither.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if isinstance(model, Path) or directory.exists() or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"model: {directory} is not a directory, wanted a checkpoint directory or a Hugging Face id"
        )
    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
                ignore_patterns=["*/*"],  # copies in other formats (gpt-oss: original/, metal/)
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"model: {model} is neither a directory here nor a Hugging Face id that can be downloaded ({reason})"
        ) from error


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in order. Raises ``FileNotFoundError`` if one is missing."""
    index = path / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"checkpoint: {index} is damaged ({error!r}), wanted JSON with a weight_map") from error
        for name in names:
            if not (path / name).is_file():
                raise FileNotFoundError(f"checkpoint: {path / name} is missing, {_INDEX} names it; download it again")
        return [path / name for name in names]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickles:
        raise FileNotFoundError(
            f"checkpoint: {path} has {some_of(pickles)} but no {_SINGLE}; pickled weights can run code and are never "
            "loaded: convert them with transformers (from_pretrained, then save_pretrained)"
        )
    raise FileNotFoundError(f"checkpoint: {path} has neither {_SINGLE} nor {_INDEX}")


def some_of(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
