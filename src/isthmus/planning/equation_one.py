"""The published split: Equation 1 of APTMoE (section 4.2), a greedy walk over popularity."""

from __future__ import annotations

from isthmus.planning.makespan import columns
from isthmus.planning.problem import LayerProblem
from isthmus.spec.plan import LayerSplit


def equation_one_experts(problem: LayerProblem) -> frozenset[int]:
    """The experts that Equation 1 gives to the accelerator, among those with tokens.

    From the least popular expert p up,

        R(p) = Σ(low → p) CPU seconds ÷ (load MHA + load gate + Σ(high → p) load expert),

    p among both sums: does computing everything up to p on the CPU take less than loading p and everything more
    popular? Experts stay on the CPU while R < 1; the first with R ≥ 1 and all above it go to the accelerator. The
    rule looks at popularity alone: whether weights are there already changes nothing, and neither do accelerator
    seconds or tokens' travel.
    """
    used = [expert for expert, count in enumerate(problem.counts) if count]
    walk = sorted(used, key=problem.counts.__getitem__)  # of equally popular ones the first stays first
    cpu_s = 0.0
    for position, expert in enumerate(walk):
        cpu_s += problem.cpu_s[expert]
        if cpu_s >= problem.dense_load_s + (len(walk) - position) * problem.load_s:
            return frozenset(walk[position:])
    return frozenset()


def equation_one_split(problem: LayerProblem, *, at_most: int | None = None) -> LayerSplit:
    """Equation 1 as the published runtime applies it: what it gives to the accelerator is loaded if need be, and what
    lies there already is computed there too. ``at_most``: the most popular so many (None: all)."""
    chosen = equation_one_experts(problem)
    counts = problem.counts
    here = {expert for expert in problem.resident if counts[expert]}
    by_popularity = sorted(chosen | here, key=lambda expert: (-counts[expert], expert))
    taken = set(by_popularity[:at_most])
    by_work = columns(problem).experts_M.tolist()
    return LayerSplit(
        on_accelerator=tuple(sorted(taken)),
        on_cpu=tuple(expert for expert in range(problem.num_experts) if expert not in taken),
        load_order=tuple(e for e in by_work if e in chosen and e in taken and problem.is_absent(e)),
    )
