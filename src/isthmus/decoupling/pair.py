"""The original and its decoupled copy: which class they are, the weights the copy begins with, and writing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from isthmus.decoupling.slicing import copy_weights
from isthmus.models.checkpoint_files import checkpoint_files, resolve_checkpoint
from isthmus.models.decoupled.architectures import auto_class_of
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.models.transformer_families import read_config
from isthmus.models.writer import write_whole
from isthmus.spec.decoupling import default_num_groups, original_layers_of, proportional_widths
from isthmus.spec.errors import IsthmusError
from isthmus.training.output import published


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a model is to be decoupled, as the user says it."""

    sub_blocks: int
    groups: int | None = None
    """Each ends with an original layer. None: every third layer is original, the last one always."""
    original_layers: tuple[int, ...] | None = None
    """Said one by one instead of by ``groups``."""
    widths: tuple[float, ...] | None = None
    """Shares of the hidden units. None: equal."""
    heads: str = "all"

    def config(self, base: PretrainedConfig) -> PretrainedConfig:
        """The configuration of ``base`` decoupled so. Raises ``IsthmusError`` for what does not fit it."""
        num_layers = getattr(base, "num_hidden_layers", None)
        if num_layers is None:
            decoupled_config(base, {})  # says that the family is not supported
            raise AssertionError(base.model_type)
        if self.groups is not None and self.original_layers is not None:
            raise IsthmusError("groups: give either --groups or --original-layers")
        layers = self.original_layers
        if layers is None:
            groups = default_num_groups(num_layers) if self.groups is None else self.groups
            layers = original_layers_of(num_layers, groups)
        widths = None
        if self.widths is not None:
            if len(self.widths) != self.sub_blocks:
                raise IsthmusError(f"widths: got {len(self.widths)} shares, wanted {self.sub_blocks}, one a sub-block")
            widths = list(proportional_widths(base.hidden_size, self.widths, self._multiple(base)))
        fields: dict[str, Any] = {
            "num_sub_blocks": self.sub_blocks,
            "original_layers": list(layers),
            "sub_block_widths": widths,
            "sub_block_heads": self.heads,
        }
        return decoupled_config(base, fields)

    @staticmethod
    def _multiple(base: PretrainedConfig) -> int:
        """Slices are a multiple of what kernels like, or of what divides a small model."""
        return next(
            multiple for multiple in (32, 16, 8, 4, 2, 1) if base.hidden_size % (multiple * 4) == 0 or multiple == 1
        )


@dataclass(frozen=True)
class Source:
    """A checkpoint that is to be decoupled."""

    directory: Path
    config: PretrainedConfig

    @property
    def is_causal(self) -> bool:
        return auto_class_of(self.config) == "AutoModelForCausalLM"

    def load(self) -> PreTrainedModel:
        """The original, FP32, in eval mode."""
        auto_class = getattr(transformers, auto_class_of(self.config))
        return auto_class.from_pretrained(self.directory, dtype=torch.float32, attn_implementation="sdpa").eval()

    def decoupled(self, original: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
        """A copy of ``original`` that is decoupled as ``config`` says, with plain slices of its weights."""
        auto_class = getattr(transformers, auto_class_of(self.config))
        config.tie_word_embeddings = original.config.tie_word_embeddings
        model = auto_class.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        copy_weights(original, model)
        return model.eval()

    def write(self, model: PreTrainedModel, output: Path) -> None:
        """Writes ``model`` with the tokenizer and whatever else belongs to the checkpoint: a Hugging Face directory."""
        with published(output) as aside:
            write_whole(model, self.directory, aside)


def open_source(model: str | Path) -> Source:
    """Finds the checkpoint ``model`` and checks that it can be decoupled. Blocks for a Hugging Face id."""
    directory = resolve_checkpoint(model)
    config = read_config(directory)
    decoupled_config(config, {}) if config.model_type.startswith("decoupled_") else None
    checkpoint_files(directory)
    return Source(directory, config)


def quiet(libraries: Sequence[Any] = (transformers.utils.logging,)) -> None:
    """No progress bars and notes of transformers: isthmus tells what goes on."""
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
