"""Layers decided on together are decided on as each alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.alike import AlikeLayers, cheapest_of_each, equation_one_of_each
from isthmus.planning.equation_one import equation_one_experts
from isthmus.planning.horizon import ChoiceTable
from isthmus.planning.pass_model import PassLayer
from isthmus.planning.problem import LayerProblem

SECONDS = st.floats(0.0, 10.0)


@st.composite
def several(draw: st.DrawFn) -> AlikeLayers:
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    counts_LE = np.array(draw(st.lists(st.integers(0, 5), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    per_token = st.lists(SECONDS, min_size=shape[1], max_size=shape[1])
    counts_LE = counts_LE.reshape(shape).astype(np.float64)
    return AlikeLayers(
        counts_LE=counts_LE,
        cpu_s_LE=counts_LE * np.array(draw(per_token)),
        accelerator_s_LE=counts_LE * np.array(draw(per_token)),
        load_s=draw(SECONDS),
        unload_s=draw(SECONDS),
        token_h2d_s=draw(SECONDS),
        token_d2h_s=draw(SECONDS),
        dense_s=draw(SECONDS),
        dense_load_s=draw(SECONDS),
    )


def alone(layers: AlikeLayers) -> list[LayerProblem]:
    return [
        LayerProblem(
            counts=tuple(int(count) for count in counts_E),
            cpu_s=tuple(cpu_s_E.tolist()),
            accelerator_s=tuple(accelerator_s_E.tolist()),
            load_s=layers.load_s,
            unload_s=layers.unload_s,
            token_h2d_s=layers.token_h2d_s,
            token_d2h_s=layers.token_d2h_s,
            dense_s=layers.dense_s,
            dense_load_s=layers.dense_load_s,
            max_on_accelerator=len(counts_E),
        )
        for counts_E, cpu_s_E, accelerator_s_E in zip(
            layers.counts_LE, layers.cpu_s_LE, layers.accelerator_s_LE, strict=True
        )
    ]


@given(several())
def test_equation_one_of_several_layers_is_that_of_each(layers: AlikeLayers) -> None:
    assert equation_one_of_each(layers) == [equation_one_experts(problem) for problem in alone(layers)]


@given(several(), st.floats(0.0, 3.0), st.sampled_from((1.0, 1.4)))
def test_the_cheapest_choice_of_several_layers_is_that_of_each(
    layers: AlikeLayers, price: float, cpu_weight: float
) -> None:
    expected = []
    for problem in alone(layers):
        weighted = replace(problem, cpu_s=tuple(cpu_weight * seconds for seconds in problem.cpu_s))
        choices = PassLayer(weighted, kept=frozenset())
        expected.append(frozenset(choices.on_accelerator(ChoiceTable(choices).cheapest(price)[0])))
    assert cheapest_of_each(layers, price, cpu_weight=cpu_weight) == expected
