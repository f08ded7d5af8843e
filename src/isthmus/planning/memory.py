"""How much memory fine-tuning needs, told before anything is loaded: on an accelerator, and on its host.

The rules are those of the runtime: which layers' dense parts share a buffer (``tuning.dense``), what is left for slots
of one expert each (``tuning.placement``), how a host's ranges are padded (``tuning.parameter_store``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from isthmus.planning.flights import largest_flight, smallest_flight
from isthmus.planning.problem import BYTES_PER_VALUE
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import OUTER_LAYER, ExpertSpec, ModelSpec, UnitKey, UnitLayout
from isthmus.spec.plan import Stage

MIN_SLOTS = 2
"""One expert computes while the next one lands; in backward one holds weights and the other their gradient."""
FP32_BYTES = 4
ALIGNMENT_BYTES = 64
"""Of every unit's range on the host: a cache line, which is also the widest vector register."""
LAYERS_IN_FLIGHT = 3
"""Layers whose weight gradients a CPU may have yet to compute: they come after the next layer's inputs' gradients."""
MIN_BUFFER_NUMEL = 1024
HOST_KINDS = ("weight", "master", "gradient", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class SavedStorages:
    """What autograd saves of one micro-batch, from forward to backward: bytes by storage, for each place in which it is
    saved. A storage has the same number wherever it is met."""

    before: Mapping[int, int]
    """Before the first layer."""
    layers: tuple[Mapping[int, int], ...]
    after: Mapping[int, int]

    def num_bytes(self, layers: Iterable[int]) -> int:
        """Of a device that has these layers, and what lies outside them with the first of all."""
        chosen = set(layers)
        places = [self.layers[layer] for layer in chosen]
        if 0 in chosen:
            places += [self.before, self.after]
        return sum({number: size for place in places for number, size in place.items()}.values())


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A model, or the layers of it that a device has, as far as memory is concerned."""

    spec: ModelSpec
    """Of the whole model."""
    dtype: str
    layouts: Mapping[UnitKey, UnitLayout]
    layers: tuple[int, ...]
    """That are here, ascending."""
    saved_bytes: int
    """That autograd saves of one micro-batch in these layers."""
    num_tokens: int
    """Of one micro-batch, padding included."""
    stages: tuple[Stage, ...] = ()
    """Those that are here, if others have the rest: a micro-batch then passes a whole stage by itself."""

    @property
    def experts(self) -> list[int]:
        """Routed experts of each layer here."""
        experts = experts_of(self.spec)
        return [experts[number] for number in self.layers]

    @property
    def num_with_gradients(self) -> int:
        """See ``most_with_gradients``."""
        return most_with_gradients(experts_of(self.spec) if self.stages else self.experts, self.stages)

    @property
    def num_experts(self) -> int:
        return sum(self.experts)

    @property
    def slot_bytes(self) -> int:
        """Of a slot: the largest expert here."""
        numels = [layer.numel for number in self.layers if (layer := self.spec.layers[number])]
        return max(numels, default=0) * BYTES_PER_VALUE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What is known of a model and its micro-batches before any weight is read."""

    spec: ModelSpec
    dtype: str
    layouts: Mapping[UnitKey, UnitLayout]
    saved: SavedStorages
    num_tokens: int
    """Of one micro-batch, padding included."""

    def part(self, layers: Iterable[int], stages: tuple[Stage, ...] = ()) -> Footprint:
        """What a device with these layers has, and with the first one all that lies outside every layer. ``stages``:
        see ``Footprint``. Its units count layers from 0, in their order."""
        chosen = tuple(sorted(layers))
        number_of = {layer: number for number, layer in enumerate(chosen)}
        if 0 in number_of:
            number_of[OUTER_LAYER] = OUTER_LAYER
        layouts = {
            UnitKey(number_of[key.layer], key.expert): layout
            for key, layout in self.layouts.items()
            if key.layer in number_of
        }
        return Footprint(
            spec=self.spec,
            dtype=self.dtype,
            layouts=layouts,
            layers=chosen,
            saved_bytes=self.saved.num_bytes(chosen),
            num_tokens=self.num_tokens,
            stages=stages,
        )

    @property
    def whole(self) -> Footprint:
        return self.part(range(self.spec.num_layers))


# --- an accelerator -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AcceleratorMemory:
    """Parts of a budget. What is left over after dense part and activations becomes slots of one expert each."""

    dense_bytes: int
    activation_bytes: int
    slot_bytes: int
    num_slots: int
    is_dense_resident: bool
    """Whether every layer's dense part stays, or the layers pass through a few buffers."""
    tried_bytes: int = 0
    """What was taken for a moment, to see whether all dense parts can stay."""

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.activation_bytes + self.num_slots * self.slot_bytes

    @property
    def peak_bytes(self) -> int:
        return max(self.total_bytes, self.tried_bytes)


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


def dense_rooms(keys: Iterable[UnitKey], num_buffers: int) -> dict[tuple[int, int], list[UnitKey]]:
    """(first layer of a buffer, kind of unit) -> the dense units that share that memory."""
    rooms: dict[tuple[int, int], list[UnitKey]] = {}
    for key in sorted(key for key in keys if not key.is_expert):
        first = key.layer if key.layer == OUTER_LAYER else key.layer % num_buffers
        rooms.setdefault((first, key.expert), []).append(key)
    return rooms


def dense_bytes(layouts: Mapping[UnitKey, UnitLayout], num_buffers: int) -> int:
    """Accelerator bytes of everything that is not a routed expert, weights and gradients, layers sharing
    ``num_buffers`` buffers; what lies outside every layer stays in any case."""
    rooms = dense_rooms(layouts, num_buffers).values()
    return sum(2 * max(_weight_bytes(layouts[key]) for key in keys) for keys in rooms)


def _weight_bytes(layout: UnitLayout) -> int:
    return layout.numel * BYTES_PER_VALUE[layout.dtype]


def experts_of(spec: ModelSpec) -> list[int]:
    """Routed experts of every layer."""
    return [0 if layer is None else layer.num_experts for layer in spec.layers]


def most_with_gradients(experts: Sequence[int], stages: Sequence[Stage]) -> int:
    """Experts whose gradients may be on an accelerator at once: a layer's or, of one among others, one of its
    ``stages``', which a micro-batch passes by itself. ``experts``: of each layer."""
    if not stages:
        return max(experts, default=0)
    return max(sum(experts[stage.first_layer : stage.last_layer + 1]) for stage in stages)


def least_slots(policy: str, experts: Sequence[int], num_with_gradients: int) -> int:
    """Slots without which the policy cannot run: whole layers where it loads whole layers, and room for gradients.
    ``experts``: of each layer."""
    most = max(experts, default=0)
    return {
        "resident": sum(experts) + num_with_gradients,
        "mobius": most + num_with_gradients + 1,
        "gpipe-offload": most + num_with_gradients + 1,
    }.get(policy, MIN_SLOTS if most else 0)


def activation_bytes(part: Footprint, num_micro_batches: int) -> int:
    """Of one step: what the dense part saves, and what experts take."""
    experts = [layer for number in part.layers if (layer := part.spec.layers[number])]
    num_tokens = part.num_tokens * num_micro_batches
    return part.saved_bytes * num_micro_batches + experts_bytes(experts, num_tokens, BYTES_PER_VALUE[part.dtype])


def experts_bytes(layers: Sequence[ExpertSpec], num_tokens: int, value_bytes: int) -> int:
    """Of one step's ``num_tokens``: experts' inputs in all ``layers``, results and intermediate values of one, and the
    rows of weight gradients that one layer leaves to the next."""
    kept = sum(layer.hidden_size for layer in layers)
    widest = max((layer.top_k * (7 * layer.hidden_size + 9 * layer.intermediate_size) for layer in layers), default=0)
    return num_tokens * (kept + widest) * value_bytes


def minimum_bytes(part: Footprint, num_micro_batches: int, policy: str) -> int:
    """The least budget with which a step runs, the layers' dense parts passing through a few buffers."""
    slots = least_slots(policy, part.experts, part.num_with_gradients) * part.slot_bytes
    return least_dense_bytes(part) + activation_bytes(part, num_micro_batches) + slots


def least_dense_bytes(part: Footprint) -> int:
    """Of dense parts that pass through as few buffers as can be."""
    return dense_bytes(part.layouts, _num_buffers(part))


def _num_buffers(part: Footprint) -> int:
    return len(part.layers) if part.stages else min(len(part.layers), num_dense_buffers(part.spec))


def flight_that_fits(
    part: Footprint, num_micro_batches: int, policy: str, budget_bytes: int, asked: int | None = None
) -> int:
    """Micro-batches in flight as the runtime chooses them (``planning.flights``), or as ``asked``; where not even the
    least fit, those: ``accelerator_memory`` then says what is missing."""
    fits = lambda size: minimum_bytes(part, size, policy) <= budget_bytes  # noqa: E731
    size = largest_flight(num_micro_batches, fits, asked)
    return smallest_flight(num_micro_batches, asked) if size is None else size


def landing_bytes(part: Footprint, memory: AcceleratorMemory) -> int:
    """Host bytes of gradients that were copied to the host and have yet to be added to those of other flights: of
    experts as many as can be on the accelerator, of dense parts as many as pass through, and one that is being
    added. Buffers' sizes are powers of two."""
    value_bytes = BYTES_PER_VALUE[part.dtype]
    experts = min(memory.num_slots + 1, part.num_experts) * _capacity(part.slot_bytes // value_bytes)
    rooms = [] if memory.is_dense_resident else dense_rooms(part.layouts, _num_buffers(part)).values()
    passing = [max(_capacity(part.layouts[key].numel) for key in keys) for keys in rooms if len(keys) > 1]
    return (experts + sum(passing) + max(passing, default=0)) * value_bytes


def accelerator_memory(part: Footprint, num_micro_batches: int, policy: str, budget_bytes: int) -> AcceleratorMemory:
    """Divides ``budget_bytes`` as the runtime does. All dense parts stay if that leaves the policy's fewest slots.

    Raises ``IsthmusError`` stating the minimum when the budget is below it.
    """
    activations = activation_bytes(part, num_micro_batches)
    all_slots = part.num_experts + part.num_with_gradients
    least_bytes = least_slots(policy, part.experts, part.num_with_gradients) * part.slot_bytes
    tried_bytes = 0
    for num_buffers in sorted({len(part.layers), _num_buffers(part)}, reverse=True):
        dense = dense_bytes(part.layouts, num_buffers)
        if dense + least_bytes > budget_bytes:
            continue
        tried_bytes = max(tried_bytes, dense)
        if dense + least_bytes + activations <= budget_bytes:
            free_bytes = budget_bytes - dense - activations
            return AcceleratorMemory(
                dense_bytes=dense,
                activation_bytes=activations,
                slot_bytes=part.slot_bytes,
                num_slots=min(free_bytes // part.slot_bytes, all_slots) if part.slot_bytes else 0,
                is_dense_resident=num_buffers == len(part.layers),
                tried_bytes=tried_bytes,
            )
    minimum = minimum_bytes(part, num_micro_batches, policy)
    raise IsthmusError(
        f"accelerator_memory: got {_mib(budget_bytes)}, wanted at least {_mib(minimum)}: dense weights and gradients "
        f"{_mib(least_dense_bytes(part))}, activations {_mib(activations)}, experts "
        f"{_mib(least_bytes)}. Raise it to the minimum, or lower the sequence length, the micro-batch size or the "
        f"number in flight, {num_micro_batches}."
    )


# --- a host ---------------------------------------------------------------------------------------------------------


def host_bytes(layouts: Iterable[UnitLayout]) -> dict[str, int]:
    """Host bytes by kind for full fine-tuning with Adam: ``weight``, ``master``, ``gradient``, ``exp_avg``,
    ``exp_avg_sq``, every unit's range padded. An FP32 weight is its own master."""
    totals: dict[str, int] = dict.fromkeys(HOST_KINDS, 0)
    for layout in layouts:
        value_bytes = BYTES_PER_VALUE[layout.dtype]
        step = ALIGNMENT_BYTES // value_bytes
        padded = -(-layout.numel // step) * step
        totals["weight"] += padded * value_bytes
        totals["gradient"] += padded * value_bytes
        totals["master"] += 0 if layout.dtype == "fp32" else padded * FP32_BYTES
        totals["exp_avg"] += padded * FP32_BYTES
        totals["exp_avg_sq"] += padded * FP32_BYTES
    return totals


def staging_bytes(part: Footprint, num_micro_batches: int, num_waves: int = 2) -> int:
    """Host bytes of tokens on their way to and from CPU experts, if all are computed there: in backward of each wave
    results and gradients, and of a few layers what their weight gradients need. Buffers' sizes are powers of two."""
    most = 0
    num_tokens = part.num_tokens * num_micro_batches / num_waves
    for number in part.layers:
        if (layer := part.spec.layers[number]) is None:
            continue
        rows = num_tokens * layer.top_k
        hidden, inner = _capacity(rows * layer.hidden_size), _capacity(rows * layer.intermediate_size)
        pre = _capacity(rows * layer.intermediate_size * (2 if layer.has_gate else 1))
        most = max(most, 2 * hidden + LAYERS_IN_FLIGHT * (2 * hidden + inner + pre))
    return num_waves * most * BYTES_PER_VALUE[part.dtype]


def _capacity(numel: float) -> int:
    return max(MIN_BUFFER_NUMEL, 1 << max(0, int(numel) - 1).bit_length())


def _mib(num_bytes: int) -> str:
    """Rounded up to a tenth, so that a stated minimum is enough."""
    return f"{-(-num_bytes * 10 // 2**20) / 10:.1f} MiB"
