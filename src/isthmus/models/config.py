"""From the name of a model to its configuration and its spec, without reading a weight."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from isthmus.models.moe_model import MoeModel
from isthmus.models.quantisation import stored_weights
from isthmus.spec.model import ModelSpec

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def load_config(model: str | Path, *, num_layers: int | None = None) -> PretrainedConfig:
    """The configuration of a Mixture-of-Experts model: a directory with a ``config.json``, or a Hugging Face id.

    ``num_layers`` keeps only the first so many layers (of the encoder and of the decoder where there are both).
    Raises ``FileNotFoundError`` if there is no such model, ``ValueError`` if it has no routed experts, has
    fewer layers, or is quantised with a method that is not read. May block on the network for a Hugging Face id.
    """
    config = _read_config(model)
    stored_weights((), getattr(config, "quantization_config", None))  # raises for a method that is not read
    if num_layers is not None:
        _truncate(config, num_layers)
    model_spec(config)
    return config


def model_spec(config: PretrainedConfig) -> ModelSpec:
    """What the model is made of, from its configuration alone. Raises ``ValueError`` as ``MoeModel.build`` does."""
    return MoeModel.build(config, "fp32").spec


def _read_config(model: str | Path) -> PretrainedConfig:
    is_path = isinstance(model, Path) or model.startswith((".", "/", "~"))
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"model: {directory} has no config.json, wanted a Hugging Face checkpoint directory"
            )
    elif is_path or directory.exists():
        raise FileNotFoundError(
            f"model: {directory} is not a directory, wanted a checkpoint directory or a Hugging Face id"
        )
    try:
        return AutoConfig.from_pretrained(directory if directory.is_dir() else str(model))
    except OSError as error:
        raise FileNotFoundError(
            f"model: {model} is neither a directory nor a Hugging Face id that can be reached ({_first_line(error)})"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"model: cannot read the configuration of {model}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _truncate(config: PretrainedConfig, num_layers: int) -> None:
    """Keeps the first ``num_layers`` layers. Mutates ``config`` such that its JSON round trip gives the same model."""
    counts = {name: count for name in _LAYER_COUNTS if isinstance(count := getattr(config, name, None), int)}
    existing = max(counts.values())
    if not 1 <= num_layers <= existing:
        raise ValueError(
            f"num_layers: got {num_layers}, wanted 1 to {existing}, the layers that {config.model_type!r} has"
        )
    for name, value in config.to_dict().items():
        is_per_layer = name.endswith("layer_types") and isinstance(value, list)
        if is_per_layer and len(value) == existing:
            setattr(config, name, value[:num_layers])
    for name, count in counts.items():
        setattr(config, name, min(count, num_layers))
