"""A layer's three resources event by event, in plain Python: what the planner's formulas are tested against."""

from __future__ import annotations

from itertools import combinations, permutations

from isthmus.planning.problem import LayerProblem


def simulate(problem: LayerProblem, on_accelerator: frozenset[int], load_order: tuple[int, ...]) -> float:
    """Seconds until CPU results are back and the accelerator is done, for loads in exactly this order."""
    used = [e for e, count in enumerate(problem.counts) if count]
    on_cpu = [e for e in used if e not in on_accelerator]
    link_s = max([problem.link_backlog_s, *problem.arriving_s.values()])
    landed = {e: problem.arriving_s.get(e, 0.0) for e in used if e in on_accelerator and not problem.is_absent(e)}
    landed.update({e: 0.0 for e in landed if e in problem.resident})
    tokens = sum(problem.counts[e] for e in on_cpu)
    done_s = max(problem.cpu_backlog_s, tokens * problem.token_d2h_s) + sum(problem.cpu_s[e] for e in on_cpu)
    queue = list(load_order)
    back_s = None if on_cpu else 0.0
    while queue or back_s is None:
        if back_s is None and (not queue or done_s <= link_s):
            link_s = max(link_s, done_s) + tokens * problem.token_h2d_s
            back_s = link_s
        else:
            link_s += problem.load_s
            landed[queue.pop(0)] = link_s
    now_s = problem.accelerator_backlog_s if landed else 0.0
    for expert in sorted(landed, key=lambda e: landed[e]):
        now_s = max(now_s, landed[expert]) + problem.accelerator_s[expert]
    return max(now_s, back_s)


def best_makespan_s(problem: LayerProblem, *, all_orders: bool = False) -> float:
    """The least over all subsets (and all load orders, else most work first)."""
    used = [e for e, count in enumerate(problem.counts) if count]
    best = float("inf")
    for num in range(min(len(used), problem.max_on_accelerator) + 1):
        for chosen in combinations(used, num):
            loads = sorted((e for e in chosen if problem.is_absent(e)), key=lambda e: -problem.accelerator_s[e])
            for order in permutations(loads) if all_orders else [tuple(loads)]:
                best = min(best, simulate(problem, frozenset(chosen), tuple(order)))
    return best
