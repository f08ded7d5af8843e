"""Checkpoints whose weights are stored quantised: which methods are read, chosen by what ``config.json`` says.

A method is a ``StoredWeights`` that dequantises while it reads, in a file of its own. What is trained and written is
never quantised, so only the reader knows of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isthmus.models.quantisation.base import StoredWeights
from isthmus.models.quantisation.fp8 import Fp8Weights
from isthmus.models.quantisation.mxfp4 import Mxfp4Weights
from isthmus.models.safetensors_file import SafetensorsReader
from isthmus.spec.errors import IsthmusError

METHODS = {"mxfp4": Mxfp4Weights, "fp8": Fp8Weights}
"""By ``quant_method``, as transformers names them."""


def stored_weights(readers: Iterable[SafetensorsReader], quantisation: Mapping[str, Any] | None) -> StoredWeights:
    """The weights in ``readers``. ``quantisation`` is the configuration's ``quantization_config``, ``None`` for plain
    weights. Raises ``IsthmusError`` for a method that is not read."""
    if quantisation is None:
        return StoredWeights(readers)
    method = quantisation.get("quant_method")
    if method not in METHODS:
        raise IsthmusError(
            f"quantization_config: got quant_method {method!r}, wanted one of {', '.join(METHODS)}, or plain weights "
            "(bf16, fp16 or fp32). Take an unquantised copy of the model, or make one: load it with transformers, "
            "dequantised where the method allows that, and save_pretrained."
        )
    return METHODS[method](readers, quantisation)


def read_quantisation(path: Path) -> Mapping[str, Any] | None:
    """What ``config.json`` in the checkpoint directory ``path`` says of quantisation; ``None`` if nothing."""
    file = path / "config.json"
    return json.loads(file.read_text()).get("quantization_config") if file.is_file() else None
