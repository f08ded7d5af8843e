"""What this hardware needs for each block of this model: the measured ground of every plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.spec.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds by token count on a geometric grid. ``num_tokens`` strictly rises, ``seconds`` never falls."""

    num_tokens: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """Of what else is measured by itself: how many times as long it takes in a step."""

    alone: float = 1.0
    """While the process's other thread does nothing."""
    beside: float = 1.0
    """While that computes."""


@dataclass(frozen=True, kw_only=True)
class ExpertTimes:
    """Seconds of ONE expert by its token count."""

    cpu_forward: Curve
    cpu_backward: Curve
    accelerator_forward: Curve
    accelerator_backward: Curve
    routing_forward: Curve | None = None
    """Seconds of sorting the rows of a layer's tokens by expert, and of bringing them together and back, by tokens of
    the layer; None: not measured, likewise below."""
    routing_backward: Curve | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured seconds. ``experts`` is keyed by ``Profile.expert_key``, since layers of one model may differ in
    shape."""

    schema_version: int = 1
    hardware: Hardware
    dtype: str
    """``fp32`` or ``bf16``."""
    experts: dict[str, ExpertTimes]
    h2d_s_per_byte: float
    d2h_s_per_byte: float
    h2d_duplex_s_per_byte: float
    """As above, while the other direction is busy too."""
    d2h_duplex_s_per_byte: float
    copy_latency_s: float
    copy_window: int
    """Copies in flight per direction from which on the copy engine no longer idles (measured)."""
    optimizer_s_per_parameter: float
    dense_forward_s_per_token: float
    """One layer's dense part (attention, norms, router, shared experts) on the accelerator."""
    dense_backward_s_per_token: float
    outer_forward_s_per_token: float = 0.0
    """Of what ``dense_forward_s_per_token`` is of all layers together: embeddings, head and loss."""
    outer_backward_s_per_token: float = 0.0
    norm_s_per_parameter: float = 0.0
    """What the norm of a gradient takes on the CPU."""
    dense_slowdown: Slowdown = field(default_factory=Slowdown)
    accelerator_slowdown: Slowdown = field(default_factory=Slowdown)
    """Of experts on the accelerator; of those on the CPU below."""
    cpu_slowdown: Slowdown = field(default_factory=Slowdown)
    optimizer_slowdown: Slowdown = field(default_factory=Slowdown)
    copy_core_s_per_byte: float = 0.0
    """Of a core, while the link copies: where a thread is the copy engine."""
    measured_at: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def expert_key(hidden_size: int, intermediate_size: int, has_gate: bool) -> str:
        return f"h{hidden_size}-i{intermediate_size}-{'glu' if has_gate else 'mlp'}"
