"""Decoupled models: Transformers most of whose layers are independent sub-blocks, one slice of the hidden units each.

The form is that of DeTransformer (DATE 2024, section III). Importing this makes ``transformers``' Auto classes know it.
"""

from isthmus.models.decoupled.architectures import layers_of, register
from isthmus.models.decoupled.configs import CONFIGS, decoupled_config, is_decoupled

__all__ = ["CONFIGS", "decoupled_config", "is_decoupled", "layers_of", "register"]

register()
