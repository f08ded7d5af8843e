"""Decisions: where experts are computed, what is loaded in which order, how layers form stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerSplit:
    """Where the experts of one layer run, for one pass over some tokens. Together the two tuples name each expert that
    has tokens exactly once; ``load_order`` is the part of ``on_accelerator`` that is not resident yet, most urgent
    first."""

    on_accelerator: tuple[int, ...]
    on_cpu: tuple[int, ...]
    load_order: tuple[int, ...] = ()
    predicted_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive layers ``first_layer`` … ``last_layer`` (inclusive) that a device holds together."""

    first_layer: int
    last_layer: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is fixed before the first step."""

    schema_version: int = 1
    policy: str
    stages: tuple[Stage, ...]
    num_slots: int
    """Slots of one expert each (weights or gradients) in accelerator memory."""
    slot_bytes: int
    dense_bytes: int
    """Accelerator bytes for dense weights and their gradients: of all layers, or of as many as are there at once."""
    activation_bytes: int
    copy_window: int
    num_waves: int
    """Most groups of micro-batches (waves) whose experts run one after the other; the policy may take fewer."""
    num_in_flight: int
    """Most micro-batches whose activations are kept at once: so many go forward and backward before the next begin."""
    is_dense_resident: bool = True
    """Whether every layer's dense part stays on the accelerator; else the layers pass through a few buffers."""


@dataclass(frozen=True, kw_only=True)
class LayerMapping:
    """Which process has which layers, and why. Seconds are predictions from what was measured, and None where nothing
    was, since there was nothing to choose."""

    stages: tuple[Stage, ...]
    ranks: tuple[int, ...]
    """Of each stage."""
    reason: str
    load_s: tuple[float, ...] | None = None
    """Of each rank: what it computes in a step."""
    step_s: float | None = None
    equal_stages_step_s: float | None = None
    """With stages of equal size instead."""
