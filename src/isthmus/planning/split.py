"""The split rules by name: where a layer's experts run, and what is loaded in which order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from isthmus.planning.affinity import affinity
from isthmus.planning.equation_one import equation_one_experts
from isthmus.planning.makespan import columns, makespans
from isthmus.planning.problem import LayerProblem
from isthmus.spec.plan import LayerSplit


class SplitRule(Protocol):
    """Every expert with tokens is named exactly once; ``predicted_s`` is the makespan of ``makespan.py``.

    ``link_price``: what a second of link time is worth elsewhere (``horizon.py``); only ``affinity`` looks at it.
    """

    def __call__(self, problem: LayerProblem, *, link_price: float = 0.0) -> LayerSplit: ...


def paper(problem: LayerProblem, *, link_price: float = 0.0) -> LayerSplit:
    """Equation 1 as published (APTMoE, section 4.2); what it gives to the accelerator is loaded if need be."""
    layer = columns(problem)
    mask_M = layer.mask(equation_one_experts(problem))
    return layer.split(mask_M, float(makespans(layer, mask_M[None])[0]))


def cpu_experts(problem: LayerProblem, *, link_price: float = 0.0) -> LayerSplit:
    """Every expert with tokens on the CPU, as KTransformers does."""
    layer = columns(problem)
    mask_M = layer.mask(frozenset())
    return layer.split(mask_M, float(makespans(layer, mask_M[None])[0]))


def whole_layer(problem: LayerProblem, *, link_price: float = 0.0) -> LayerSplit:
    """Every expert on the accelerator, also those without tokens: layers are loaded whole (Mobius, GPipe)."""
    predicted_s = _all_on_accelerator_s(problem)
    by_work = sorted(range(problem.num_experts), key=lambda e: (-problem.accelerator_s[e], e))
    loads = tuple(expert for expert in by_work if problem.is_absent(expert))
    return LayerSplit(
        on_accelerator=tuple(range(problem.num_experts)), on_cpu=(), load_order=loads, predicted_s=predicted_s
    )


def resident(problem: LayerProblem, *, link_price: float = 0.0) -> LayerSplit:
    """Every expert on the accelerator, where it stays: nothing is loaded."""
    return LayerSplit(
        on_accelerator=tuple(range(problem.num_experts)),
        on_cpu=(),
        predicted_s=problem.accelerator_backlog_s + sum(problem.accelerator_s),
    )


def _all_on_accelerator_s(problem: LayerProblem) -> float:
    layer = columns(problem)
    return float(makespans(layer, layer.mask(frozenset(range(problem.num_experts)))[None])[0])


SPLIT_RULES: Mapping[str, SplitRule] = MappingProxyType(
    {
        "affinity": affinity,
        "paper": paper,
        "mobius": whole_layer,
        "gpipe-offload": whole_layer,
        "cpu-experts": cpu_experts,
        "resident": resident,
    }
)


def split_rule(name: str) -> SplitRule:
    """The rule called ``name``. Raises ``ValueError`` with the names there are."""
    if name not in SPLIT_RULES:
        raise ValueError(f"split rule: got {name!r}, wanted one of {', '.join(sorted(SPLIT_RULES))}")
    return SPLIT_RULES[name]
