"""How a budget of accelerator memory is divided, and how much host memory the method needs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from isthmus.planning.problem import BYTES_PER_VALUE
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ModelSpec

MIN_SLOTS = 2
"""One expert computes while the next one lands; in backward one holds weights and the other their gradient."""
FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class AcceleratorMemory:
    """Parts of a budget. What is left over after dense part and activations becomes slots of one expert each."""

    dense_bytes: int
    activation_bytes: int
    slot_bytes: int
    num_slots: int

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.activation_bytes + self.num_slots * self.slot_bytes


def num_dense_buffers(spec: ModelSpec) -> int:
    """Layers whose dense parts have to be on the accelerator at once where they do not all stay, layer ``l`` in buffer
    ``l`` mod this number.

    Micro-batches stop at routed experts only: while one is still in an MoE layer, the others are there, in the next MoE
    layer, or on the way. So many layers are in use at once; one more can arrive meanwhile.
    """
    stops = spec.moe_layers
    if not stops:
        return spec.num_layers
    spans = [stops[0] + 1, spec.num_layers - stops[-1], *(after - before + 1 for before, after in pairwise(stops))]
    return min(spec.num_layers, max(spans) + 1)


def dense_bytes(spec: ModelSpec, dtype: str, num_buffers: int | None = None) -> int:
    """Accelerator bytes of everything that is not a routed expert, weights and gradients. ``num_buffers``: layers share
    that many buffers (None: all stay); what lies outside every layer stays in any case."""
    layers = spec.dense_numel
    if num_buffers is not None:
        layers = [max(layers[first::num_buffers]) for first in range(min(num_buffers, len(layers)))]
    return 2 * (sum(layers) + spec.outer_numel) * BYTES_PER_VALUE[dtype]


def slot_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one slot: the largest expert. Raises ``IsthmusError`` for a model without routed experts."""
    largest = max((layer.numel for layer in spec.layers if layer is not None), default=0)
    if not largest:
        raise IsthmusError(f"model: {spec.architecture} has no routed experts; wanted a Mixture-of-Experts model")
    return largest * BYTES_PER_VALUE[dtype]


def minimum_budget_bytes(spec: ModelSpec, dtype: str, *, activation_bytes: int, min_slots: int = MIN_SLOTS) -> int:
    """The least budget with which a step runs, the layers' dense parts passing through a few buffers. ``min_slots``:
    what the policy needs at least."""
    return dense_bytes(spec, dtype, num_dense_buffers(spec)) + activation_bytes + min_slots * slot_bytes(spec, dtype)


def accelerator_memory(
    spec: ModelSpec, dtype: str, *, budget_bytes: int, activation_bytes: int, min_slots: int = MIN_SLOTS
) -> AcceleratorMemory:
    """Divides ``budget_bytes``. ``activation_bytes``: the caller's measurement of one step's activations.

    All dense parts stay if that leaves ``min_slots``. No more slots than weights and gradients of all experts fill.
    Raises ``IsthmusError`` stating the minimum when the budget is below it.
    """
    minimum = minimum_budget_bytes(spec, dtype, activation_bytes=activation_bytes, min_slots=min_slots)
    dense, slot = dense_bytes(spec, dtype), slot_bytes(spec, dtype)
    if dense + activation_bytes + min_slots * slot > budget_bytes:
        dense = dense_bytes(spec, dtype, num_dense_buffers(spec))
    if budget_bytes < minimum:
        raise IsthmusError(
            f"accelerator_memory: got {_mib(budget_bytes)}, wanted at least {_mib(minimum)}: dense weights and "
            f"gradients {_mib(dense)}, activations {_mib(activation_bytes)}, {min_slots} experts of {_mib(slot)}. "
            "Raise it to the minimum, or lower the sequence length, the micro-batch size or their number."
        )
    num_experts = sum(layer.num_experts for layer in spec.layers if layer is not None)
    num_slots = min((budget_bytes - dense - activation_bytes) // slot, max(min_slots, 2 * num_experts))
    return AcceleratorMemory(dense_bytes=dense, activation_bytes=activation_bytes, slot_bytes=slot, num_slots=num_slots)


def host_memory(spec: ModelSpec, dtype: str) -> dict[str, int]:
    """Host bytes by kind for full fine-tuning with Adam: ``weight``, ``master``, ``gradient``, ``exp_avg``,
    ``exp_avg_sq``.

    An FP32 weight is its own master. Alignment and whatever the process needs besides are not in it.
    """
    num, value_bytes = spec.num_parameters, BYTES_PER_VALUE[dtype]
    return {
        "weight": num * value_bytes,
        "master": 0 if dtype == "fp32" else num * FP32_BYTES,
        "gradient": num * value_bytes,
        "exp_avg": num * FP32_BYTES,
        "exp_avg_sq": num * FP32_BYTES,
    }


def _mib(num_bytes: int) -> str:
    """Rounded up to a tenth, so that a stated minimum is enough."""
    return f"{-(-num_bytes * 10 // 2**20) / 10:.1f} MiB"
