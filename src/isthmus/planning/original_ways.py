"""What a plan says of a decoupled model's original layers: the way each is computed, its codec, who has which share."""

from __future__ import annotations

from isthmus.planning.block_layout import BlockLayout
from isthmus.planning.shares import divide_layer
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import LayerShare, TransformerSpec

ON_ALL = ("gather", "tokens", "sequence")
"""Ways of which every device needs all of the layer."""


def original_plans(plan: InferencePlan, spec: TransformerSpec) -> dict[int, str]:
    """How each original layer of a decoupled model is computed, by its number. Raises ``IsthmusError`` for another
    number of them than the model has."""
    if spec.decoupling is None:
        return {}
    layers = spec.decoupling.original_layers
    chosen = plan.originals or ("gather",) * len(layers)
    if len(chosen) != len(layers):
        raise IsthmusError(f"originals: got {len(chosen)} plans for {len(layers)} original layers, wanted one for each")
    return dict(zip(layers, chosen, strict=True))


def layer_codecs(plan: InferencePlan, spec: TransformerSpec) -> list[str]:
    """What exchanges before and in each layer, and after the last one, are in: an original layer's up to the next one.
    Raises ``IsthmusError`` as ``original_plans``."""
    layers = () if spec.decoupling is None else spec.decoupling.original_layers
    codecs = plan.codecs or (plan.codec,) * len(layers)
    if len(codecs) != len(layers):
        raise IsthmusError(f"codecs: got {len(codecs)} for {len(layers)} original layers, wanted one for each")
    own = dict(zip(layers, codecs, strict=True))
    found = [codecs[0] if codecs else plan.codec]
    for number in range(spec.num_layers):
        found[number:] = [own.get(number, found[number])] * 2
    return found


def original_shares(plan: InferencePlan, spec: TransformerSpec) -> list[dict[int, LayerShare | None]]:
    """By device: of which original layers it has another share than the whole; None is no part."""
    num_devices = len(plan.devices)
    shares: list[dict[int, LayerShare | None]] = [{} for _ in range(num_devices)]
    if num_devices == 1 or spec.decoupling is None:
        return shares
    kinds, fastest = original_plans(plan, spec), BlockLayout.of(plan, spec).fastest
    parts = divide_layer(spec, plan.weights) if "tensor" in kinds.values() else []
    for number, kind in kinds.items():
        for device in range(num_devices):
            if kind == "tensor":
                shares[device][number] = parts[device]
            elif kind == "fastest" and device != fastest:
                shares[device][number] = None
    return shares
