"""Configurations of decoupled models: the base family's, and how it is decoupled. ``model_type`` is ``decoupled_bert``
and so on."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from isthmus.spec.decoupling import Decoupling, decoupling
from isthmus.spec.errors import IsthmusError

PREFIX = "decoupled_"


class DecoupledConfig:
    """What every decoupled configuration adds. The names are those of ``config.json``."""

    num_sub_blocks: int = 2
    original_layers: list[int] | None = None
    """Layers that stay as they are, from 0. None: the last."""
    sub_block_widths: list[int] | None = None
    """None: all equal."""
    sub_block_heads: str = "all"
    base_model_type: str = ""

    @property
    def decoupling(self: Any) -> Decoupling:
        """Checked against the model's sizes; raises ``IsthmusError``."""
        originals = [self.num_hidden_layers - 1] if self.original_layers is None else self.original_layers
        return decoupling(
            num_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=getattr(self, "num_key_value_heads", None) or self.num_attention_heads,
            num_sub_blocks=self.num_sub_blocks,
            original_layers=originals,
            widths=self.sub_block_widths,
            heads=self.sub_block_heads,
        )


def _decoupled(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    body = {
        "model_type": PREFIX + base.model_type,
        "base_model_type": base.model_type,
        "__annotations__": DecoupledConfig.__annotations__,
        "__module__": __name__,
    } | {name: getattr(DecoupledConfig, name) for name in DecoupledConfig.__annotations__ if name != "base_model_type"}
    return type(f"Decoupled{base.__name__}", (DecoupledConfig, base), body)


CONFIGS: dict[str, type[PretrainedConfig]] = {
    base.model_type: _decoupled(base)
    for base in (BertConfig, RobertaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
}
"""Decoupled configurations by the model type of their base."""
for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
globals().update({config.__name__: config for config in CONFIGS.values()})


def is_decoupled(config: PretrainedConfig) -> bool:
    return isinstance(config, DecoupledConfig)


def decoupled_config(base: PretrainedConfig, wanted: dict[str, Any]) -> PretrainedConfig:
    """The configuration of ``base`` decoupled as ``wanted``: the fields of ``DecoupledConfig``.

    Raises ``IsthmusError`` for a family that cannot be decoupled, one that is already, and what does not fit.
    """
    if is_decoupled(base):
        raise IsthmusError(
            f"model: is already decoupled, into {base.num_sub_blocks} sub-blocks; wanted the original checkpoint"  # type: ignore[attr-defined]
        )
    config_class = CONFIGS.get(base.model_type)
    if config_class is None:
        raise IsthmusError(f"model: a {base.model_type!r} cannot be decoupled; wanted one of {', '.join(CONFIGS)}")
    fields = base.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    config: Any = config_class(**fields, **wanted)
    _ = config.decoupling
    return config
