"""How often tokens chose each expert, step by step: the file that a run records and a simulation replays.

The file is numpy's ``.npz`` without pickles: ``schema_version`` (), ``counts`` (steps, L, E) of whole numbers, the L
MoE layers in execution order and experts by number (rows of layers with fewer experts end in zeros), ``num_experts``
(L,), ``top_k`` (L,), and the text ``model``: the architecture, hidden and inner sizes that say whose counts they are.

Legend: ``L`` MoE layers, ``E`` experts of the layer that has most.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.model import ModelSpec

SCHEMA_VERSION = 1
ZIP_MAGIC = b"PK\x03\x04"
"""What an ``.npz`` begins with."""
_FIELDS = ("schema_version", "model", "num_experts", "top_k", "counts")


def model_identity(spec: ModelSpec) -> str:
    """What says whether counts are of this model: its architecture, and the shape of every MoE layer's experts."""
    parts = [f"{layer.hidden_size}x{layer.intermediate_size}" for layer in spec.layers if layer is not None]
    same = len(set(parts)) == 1
    return f"{spec.architecture} {len(parts)} x {parts[0]}" if same else f"{spec.architecture} {' '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class PopularityTrace:
    """Counts of all steps. Raises ``IsthmusError`` for what cannot be counts."""

    model: str
    num_experts: tuple[int, ...]
    """Of every MoE layer, (L,)."""
    top_k: tuple[int, ...]
    counts: NDArray[np.int64]
    """(steps, L, E)."""

    def __post_init__(self) -> None:
        shape = self.counts.shape
        wanted = (len(self.num_experts), max(self.num_experts, default=0))
        if len(shape) != 3 or shape[1:] != wanted or not shape[0]:
            raise IsthmusError(
                f"counts: got shape {shape}, wanted (steps, {wanted[0]}, {wanted[1]}) with one step or more"
            )
        if len(self.top_k) != len(self.num_experts):
            raise IsthmusError(f"top_k: got {len(self.top_k)} layers, wanted {len(self.num_experts)} as in num_experts")
        if (self.counts < 0).any():
            raise IsthmusError("counts: some are below 0, wanted tokens")
        beyond = np.arange(wanted[1])[None, :] >= np.array(self.num_experts)[:, None]
        if self.counts[:, beyond].any():
            raise IsthmusError("counts: a layer has tokens beyond its num_experts, wanted zeros there")

    @classmethod
    def of_steps(cls, spec: ModelSpec, steps: Sequence[Mapping[int, Sequence[int]]]) -> PopularityTrace:
        """From what runs keep: of every step tokens (E,) by layer number, all of the model's MoE layers. Raises
        ``IsthmusError`` for no steps."""
        layers = [(number, layer) for number, layer in enumerate(spec.layers) if layer is not None]
        num_experts = tuple(layer.num_experts for _, layer in layers)
        counts = np.zeros((len(steps), len(layers), max(num_experts, default=0)), np.int64)
        for step, counts_LE in enumerate(steps):
            for row, (number, layer) in enumerate(layers):
                counts[step, row, : layer.num_experts] = counts_LE[number]
        return cls(
            model=model_identity(spec),
            num_experts=num_experts,
            top_k=tuple(layer.top_k for _, layer in layers),
            counts=counts,
        )

    @property
    def skewness_L(self) -> NDArray[np.float64]:
        """G of each layer (L,): Σ_e p_e², p_e the share of the layer's tokens in a step, the mean over steps."""
        return np.square(self._shares()).sum(axis=-1).mean(axis=0)

    @property
    def drift(self) -> float:
        """Share of a layer's choices that go to other experts than in the step before: half of Σ_e of shares'
        differences, the mean over layers and steps. 0 for one step."""
        shares = self._shares()
        return float(np.abs(np.diff(shares, axis=0)).sum(axis=-1).mean() / 2) if len(shares) > 1 else 0.0

    @property
    def drift_by_chance(self) -> float:
        """What ``drift`` would be if every choice were drawn by itself from the layer's popularity over all steps."""
        totals = self.counts.sum(axis=-1, keepdims=True)
        mean = self.counts.sum(axis=0) / np.maximum(self.counts.sum(axis=(0, 2))[:, None], 1)
        # The difference of two means of n draws each is normal in good approximation; its size's mean is √(2/π) of its
        # deviation.
        deviation = np.sqrt(2 * mean * (1 - mean) / np.maximum(totals, 1))
        return float(deviation.sum(axis=-1).mean() * np.sqrt(2 / np.pi) / 2) if len(self.counts) > 1 else 0.0

    def _shares(self) -> NDArray[np.float64]:
        """(steps, L, E) of each layer's tokens; zeros for a layer without any."""
        return self.counts / np.maximum(self.counts.sum(axis=-1, keepdims=True), 1)

    def check(self, spec: ModelSpec) -> None:
        """Raises ``IsthmusError`` if the counts are of another model than ``spec``."""
        experts = tuple(layer.num_experts for layer in spec.layers if layer is not None)
        if self.model != model_identity(spec) or self.num_experts != experts:
            raise IsthmusError(
                f"popularity: the trace is of another model: {self.model} with {_counted(self.num_experts)} experts, "
                f"wanted {model_identity(spec)} with {_counted(experts)}; record one with this model"
            )


def write_trace(trace: PopularityTrace, path: Path) -> None:
    """Writes the file in one step (``OSError``)."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        schema_version=np.array(SCHEMA_VERSION),
        model=np.array(trace.model),
        num_experts=np.array(trace.num_experts),
        top_k=np.array(trace.top_k),
        counts=trace.counts,
    )
    atomic_write(path, buffer.getvalue())


def read_trace(path: Path) -> PopularityTrace:
    """What ``write_trace`` wrote. Raises ``IsthmusError`` that names the file and the field."""
    try:
        written = path.read_bytes()
        if not written.startswith(ZIP_MAGIC):  # numpy would ask for pickles
            raise IsthmusError(f"popularity: {path} is no .npz; wanted a trace, as isthmus trace writes it")
        with np.load(io.BytesIO(written), allow_pickle=False) as file:
            if missing := [name for name in _FIELDS if name not in file]:
                raise IsthmusError(f"popularity: {path} has no {', '.join(missing)}; wanted a trace")
            version = int(file["schema_version"])
            if version != SCHEMA_VERSION:
                raise IsthmusError(
                    f"popularity: {path}: schema_version is {version}, wanted {SCHEMA_VERSION}: record it again"
                )
            return PopularityTrace(
                model=str(file["model"]),
                num_experts=tuple(file["num_experts"].tolist()),
                top_k=tuple(file["top_k"].tolist()),
                counts=file["counts"].astype(np.int64),
            )
    except OSError as error:
        reason = error.strerror or "it is no .npz"
        raise IsthmusError(f"popularity: cannot read {path}: {reason}; wanted gini=… or a trace") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise IsthmusError(f"popularity: {path} is no whole .npz ({error}); record the trace again") from error
    except IsthmusError:
        raise
    except ValueError as error:
        raise IsthmusError(f"popularity: {path}: {error}; wanted a trace") from error


def _counted(numbers: tuple[int, ...]) -> str:
    return f"{len(numbers)} × {numbers[0]}" if len(set(numbers)) == 1 else str(list(numbers))
