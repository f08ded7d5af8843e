"""A whole pass (one wave) played through copy by copy and expert by expert: what ``pass_model`` is tested against."""

from __future__ import annotations

from isthmus.planning.problem import LayerProblem


class Slots:
    """``num`` places; ``take`` gives the time from which the next one is free."""

    def __init__(self, num: int) -> None:
        self.free_s = [0.0] * num

    def take(self) -> float:
        first = min(self.free_s)
        self.free_s.remove(first)
        return first


def simulate_pass(problems: list[LayerProblem], on_accelerator: list[list[int]], num_slots: int) -> float:
    """Seconds until everything is computed and every gradient is on the host. Nothing is there at the start.

    ``on_accelerator``: per layer, in the order of loading.
    """
    slots = Slots(num_slots)
    accelerator_s = link_s = d2h_s = returned_s = 0.0
    for problem, chosen in zip(problems, on_accelerator, strict=True):
        on_cpu = [e for e, count in enumerate(problem.counts) if count and e not in chosen]
        tokens = sum(problem.counts[e] for e in on_cpu)
        accelerator_s = max(accelerator_s, returned_s) + problem.dense_s
        if on_cpu:
            d2h_s = max(d2h_s, accelerator_s) + tokens * problem.token_d2h_s
            returned_s = d2h_s + sum(problem.cpu_s[e] for e in on_cpu) + tokens * problem.token_h2d_s
        for expert in chosen:
            link_s = max(link_s, slots.take()) + problem.load_s
            accelerator_s = max(accelerator_s, link_s)
            if problem.unload_s:
                accelerator_s = max(accelerator_s, slots.take())
            accelerator_s += problem.accelerator_s[expert]
            slots.free_s.append(accelerator_s)
            if problem.unload_s:
                d2h_s = max(d2h_s, accelerator_s) + problem.unload_s
                slots.free_s.append(d2h_s)
        link_s += tokens * problem.token_h2d_s
    return max(accelerator_s, returned_s, d2h_s)
