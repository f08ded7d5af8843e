"""What is to be decided: one layer's experts in one pass, priced on either side from a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.planning.curves import evaluate
from isthmus.spec.model import ExpertSpec, ModelSpec
from isthmus.spec.profile import ExpertTimes, Profile

WEIGHT_GRADIENT_SHARE = 3 / 8
"""Of an expert's backward: the products W_down and W_up (1 + 2 of a gated expert) against those two again for the
inputs' gradients and W_up recomputed."""
BYTES_PER_VALUE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """One layer's experts in one pass (forward or backward) over some tokens. ``E`` experts, numbered by position."""

    counts: tuple[int, ...]
    """Tokens per expert (E,)."""
    cpu_s: tuple[float, ...]
    """Seconds of each expert on the CPU at its count (E,); 0 without tokens."""
    accelerator_s: tuple[float, ...]
    load_s: float
    """Seconds to bring one expert's weights to the accelerator."""
    unload_s: float = 0.0
    """Seconds to bring one accelerator expert's gradient to the host after the pass; 0 in forward."""
    token_h2d_s: float = 0.0
    """Seconds per token that a CPU expert's results travel to the accelerator."""
    token_d2h_s: float = 0.0
    """Seconds per token that a CPU expert's inputs travel to the host."""
    resident: frozenset[int] = frozenset()
    """Experts whose weights the accelerator holds."""
    arriving_s: Mapping[int, float] = field(default_factory=dict)
    """Experts on their way: seconds from now until they have landed."""
    dense_s: float = 0.0
    """Accelerator seconds of the layer's dense part before its experts start. Only whole-pass planning counts it."""
    optimizer_s: float = 0.0
    """CPU seconds of the optimizer step that must be done before the layer's weights can be loaded or used. Only
    whole-pass planning counts it."""
    deferrable: float = 0.0
    """Share of every expert's seconds that nothing in the pass waits for. Only whole-pass planning counts it."""
    dense_load_s: float = 0.0
    """Seconds to load attention and gate: the denominator's constant in Equation 1. 0 where they are resident."""
    cpu_backlog_s: float = 0.0
    """Seconds of work that is queued already and comes first; likewise below (``link``: host to accelerator)."""
    accelerator_backlog_s: float = 0.0
    link_backlog_s: float = 0.0
    max_on_accelerator: int
    """Most experts with tokens that may be computed on the accelerator."""

    def __post_init__(self) -> None:
        if not len(self.counts) == len(self.cpu_s) == len(self.accelerator_s):
            raise ValueError(
                f"counts, cpu_s, accelerator_s: got {len(self.counts)}, {len(self.cpu_s)}, {len(self.accelerator_s)} "
                "entries, wanted one per expert in each"
            )

    @property
    def num_experts(self) -> int:
        return len(self.counts)

    def is_absent(self, expert: int) -> bool:
        """Whether the expert would have to be loaded: neither there nor on its way."""
        return expert not in self.resident and expert not in self.arriving_s


def expert_times(profile: Profile, expert: ExpertSpec) -> ExpertTimes:
    """The measured curves of experts of this shape. Raises ``ValueError`` if the profile has none."""
    key = Profile.expert_key(expert.hidden_size, expert.intermediate_size, expert.has_gate)
    if key not in profile.experts:
        raise ValueError(
            f"profile.experts: got {sorted(profile.experts)}, wanted {key!r}; measure the profile with this model"
        )
    return profile.experts[key]


def layer_problem(
    profile: Profile,
    expert: ExpertSpec,
    counts_E: Sequence[int],
    *,
    is_backward: bool,
    resident: frozenset[int] = frozenset(),
    arriving_s: Mapping[int, float] | None = None,
    max_on_accelerator: int | None = None,
    num_parts: int = 1,
    cpu_backlog_s: float = 0.0,
    accelerator_backlog_s: float = 0.0,
    link_backlog_s: float = 0.0,
) -> LayerProblem:
    """Prices a layer with the profile. ``counts_E``: tokens per expert (E,), of all ``top_k`` choices, which are
    computed in ``num_parts`` equal parts one after the other (waves): what an expert costs whatever its tokens is paid
    each time.

    Copies count at the profile's rates: forward loads alone, backward while gradients run the other way (the anchors'
    bound: full duplex is not a given). A CPU expert's token carries its hidden state up and its result down; in
    backward the hidden state and the output's gradient up. ``max_on_accelerator`` None: all, since slots are reused
    within a layer.
    """
    times = expert_times(profile, expert)
    value_bytes = BYTES_PER_VALUE[profile.dtype]
    token_bytes = expert.hidden_size * value_bytes
    expert_bytes = expert.numel * value_bytes
    if is_backward:
        cpu, accelerator = times.cpu_backward, times.accelerator_backward
        h2d_s_per_byte = max(profile.h2d_s_per_byte, profile.h2d_duplex_s_per_byte)
        d2h_s_per_byte = max(profile.d2h_s_per_byte, profile.d2h_duplex_s_per_byte)
        unload_s = profile.copy_latency_s + expert_bytes * d2h_s_per_byte
        dense_s_per_token = profile.dense_backward_s_per_token
    else:
        cpu, accelerator = times.cpu_forward, times.accelerator_forward
        h2d_s_per_byte, d2h_s_per_byte = profile.h2d_s_per_byte, profile.d2h_s_per_byte
        unload_s = 0.0
        dense_s_per_token = profile.dense_forward_s_per_token
    part_E = [count / num_parts for count in counts_E]
    return LayerProblem(
        counts=tuple(counts_E),
        cpu_s=tuple((num_parts * evaluate(cpu, part_E)).tolist()),
        accelerator_s=tuple((num_parts * evaluate(accelerator, part_E)).tolist()),
        load_s=profile.copy_latency_s + expert_bytes * h2d_s_per_byte,
        unload_s=unload_s,
        token_h2d_s=token_bytes * h2d_s_per_byte,
        token_d2h_s=token_bytes * d2h_s_per_byte * (2 if is_backward else 1),
        resident=resident,
        arriving_s={} if arriving_s is None else arriving_s,
        dense_s=dense_s_per_token * sum(counts_E) / expert.top_k,
        deferrable=WEIGHT_GRADIENT_SHARE if is_backward else 0.0,
        cpu_backlog_s=cpu_backlog_s,
        accelerator_backlog_s=accelerator_backlog_s,
        link_backlog_s=link_backlog_s,
        max_on_accelerator=len(counts_E) if max_on_accelerator is None else max_on_accelerator,
    )


@dataclass(frozen=True)
class CostModel:
    """A profile and the model it was measured with: prices any MoE layer of the model."""

    profile: Profile
    spec: ModelSpec

    def optimizer_s(self, layer: int) -> float:
        """CPU seconds of the optimizer step of all the layer's parameters."""
        return self.spec.layer_numel(layer) * self.profile.optimizer_s_per_parameter

    def problem(
        self,
        layer: int,
        counts_E: Sequence[int],
        *,
        is_backward: bool,
        resident: frozenset[int] = frozenset(),
        arriving_s: Mapping[int, float] | None = None,
        max_on_accelerator: int | None = None,
        num_parts: int = 1,
        cpu_backlog_s: float = 0.0,
        accelerator_backlog_s: float = 0.0,
        link_backlog_s: float = 0.0,
    ) -> LayerProblem:
        """``layer_problem`` for ``layer`` in execution order. Raises ``ValueError`` if it has no experts."""
        expert = self.spec.layers[layer]
        if expert is None:
            raise ValueError(f"layer: got {layer}, which has no routed experts; wanted one of {self.spec.moe_layers}")
        return layer_problem(
            self.profile,
            expert,
            counts_E,
            is_backward=is_backward,
            resident=resident,
            arriving_s=arriving_s,
            max_on_accelerator=max_on_accelerator,
            num_parts=num_parts,
            cpu_backlog_s=cpu_backlog_s,
            accelerator_backlog_s=accelerator_backlog_s,
            link_backlog_s=link_backlog_s,
        )
