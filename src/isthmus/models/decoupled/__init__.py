"""Decoupled models: Transformers most of whose layers are independent sub-blocks, one slice of the hidden units each.

The form is that of DeTransformer (DATE 2024, section III). ``configs`` and ``architectures`` make ``transformers``'
Auto classes know them when they are imported; ``import isthmus`` sees to that.
"""
