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


class Filler:
    """Work that one resource does whenever it would idle: ``pieces`` in order, each begun only if half of it fits."""

    def __init__(self) -> None:
        self.pieces: list[float] = []
        self.done_s: list[float] = []

    def fill(self, from_s: float, until_s: float, *, at_least: int = 0) -> float:
        """Seconds at which the resource is free again."""
        while self.pieces and (len(self.done_s) < at_least or from_s + self.pieces[0] / 2 <= until_s):
            from_s += self.pieces.pop(0)
            self.done_s.append(from_s)
        return from_s


def simulate_forward_on_cpu(problems: list[LayerProblem], steps_ahead: int) -> float:
    """Seconds of a forward pass with every expert on the CPU, which also does the optimizer's steps."""
    cpu, cpu_s, accelerator_s, returned_s = Filler(), 0.0, 0.0, 0.0
    cpu.pieces = [problem.optimizer_s for problem in problems]
    for number, problem in enumerate(problems):
        start_s = max(accelerator_s, returned_s)
        cpu_s = cpu.fill(cpu_s, start_s, at_least=number + 1)
        start_s = max(start_s, cpu.done_s[number])
        tokens = sum(problem.counts)
        accelerator_s = start_s + problem.dense_s
        sent_s = accelerator_s + tokens * problem.token_d2h_s
        cpu_s = cpu.fill(cpu_s, sent_s, at_least=min(len(problems), number + 1 + steps_ahead))
        cpu_s = max(cpu_s, sent_s) + sum(problem.cpu_s)
        returned_s = cpu_s + tokens * problem.token_h2d_s
    return returned_s


def simulate_backward(problems: list[LayerProblem], on_accelerator: list[list[int]]) -> float:
    """Seconds of computing in a backward pass whose copies take no time, weight gradients in idle time."""
    left = {"cpu": 0.0, "accelerator": 0.0}
    cpu_s = accelerator_s = returned_s = 0.0

    def idle(side: str, seconds: float) -> None:
        left[side] = max(0.0, left[side] - seconds)

    for problem, chosen in zip(problems, on_accelerator, strict=True):
        start_s = max(accelerator_s, returned_s)
        idle("accelerator", start_s - accelerator_s)
        accelerator_s = start_s + problem.dense_s
        now = 1 - problem.deferrable
        on_cpu = [expert for expert in range(problem.num_experts) if expert not in chosen]
        if on_cpu:
            idle("cpu", max(0.0, accelerator_s - cpu_s))
            work_s = sum(problem.cpu_s[expert] for expert in on_cpu)
            returned_s = cpu_s = max(cpu_s, accelerator_s) + now * work_s
            left["cpu"] += problem.deferrable * work_s
        work_s = sum(problem.accelerator_s[expert] for expert in chosen)
        accelerator_s += now * work_s
        left["accelerator"] += problem.deferrable * work_s
    return max(cpu_s + left["cpu"], accelerator_s + left["accelerator"])
