"""Random planning problems for the property tests. Times are whole numbers of seconds, so that sums are exact."""

from __future__ import annotations

from hypothesis import strategies as st

from isthmus.planning.problem import LayerProblem


@st.composite
def layer_problems(draw: st.DrawFn, *, min_experts: int = 1, max_experts: int = 6, full: bool = False) -> LayerProblem:
    """``full``: every expert has tokens, nothing is there and slots do not matter."""
    num = draw(st.integers(min_experts, max_experts))
    counts = draw(st.lists(st.integers(1 if full else 0, 300), min_size=num, max_size=num))
    cpu_slope, cpu_base = draw(st.integers(1, 20)), draw(st.integers(0, 400))
    work_slope, work_base = draw(st.integers(0, 3)), draw(st.integers(0, 100))
    load = draw(st.integers(0, 3000))
    places = draw(st.lists(st.sampled_from("RAN"), min_size=num, max_size=num))
    arriving = [e for e, place in enumerate(places) if place == "A" and not full]
    return LayerProblem(
        counts=tuple(counts),
        cpu_s=tuple(float(cpu_base + cpu_slope * count) if count else 0.0 for count in counts),
        accelerator_s=tuple(float(work_base + work_slope * count) if count else 0.0 for count in counts),
        load_s=float(load),
        unload_s=float(draw(st.sampled_from([0, load]))),
        token_h2d_s=float(draw(st.integers(0, 3))),
        token_d2h_s=float(draw(st.integers(0, 3))),
        resident=frozenset(e for e, place in enumerate(places) if place == "R" and not full),
        arriving_s={e: float(load * (position + 1)) for position, e in enumerate(arriving)},
        dense_s=float(draw(st.integers(0, 500))),
        cpu_backlog_s=0.0 if full else float(draw(st.sampled_from([0, 500]))),
        accelerator_backlog_s=0.0 if full else float(draw(st.sampled_from([0, 300]))),
        link_backlog_s=0.0 if full else float(draw(st.sampled_from([0, 1500]))),
        max_on_accelerator=num if full else draw(st.integers(0, num)),
    )
