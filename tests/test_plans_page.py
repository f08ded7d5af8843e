"""``docs/plans.md``: pictures are what the script draws of the planner's steps, tables what the planner says."""

from __future__ import annotations

import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.planning.exchanges import HEADER_BYTES
from isthmus.planning.inference import choose, predict
from isthmus.planning.step_seconds import Crew
from isthmus.planning.steps import Step
from isthmus.simulation.inference import at_bandwidth, question_of
from isthmus.simulation.shapes import SHAPES
from isthmus.spec.inference import InferencePlan, InferenceRequest

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "plans.md").read_text()
PICTURES = DOCS / "pictures"
MOST_BYTES = 30_000
TEXT = InferenceRequest(num_tokens=128)
SPEC = SHAPES["bert-base"]
_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script that draws, as a module."""
    sys.path.insert(0, str(PICTURES))
    try:
        import draw_plans  # type: ignore[import-not-found]

        yield draw_plans
    finally:
        sys.path.remove(str(PICTURES))


def test_pictures_are_what_is_drawn(script: Any) -> None:
    """If the planner has changed: ``python docs/pictures/draw_plans.py``, look at them, and read the page again."""
    drawn = script.pictures()
    assert {path.name for path in PICTURES.glob("*.svg")} == set(drawn)
    assert [name for name, text in drawn.items() if (PICTURES / name).read_text() != text] == []


def test_pictures_are_small_and_well_formed_and_the_page_shows_each() -> None:
    paths = sorted(PICTURES.glob("*.svg"))
    shown = re.findall(r"!\[[^\]]+\]\(pictures/([^)]+)\)", PAGE)
    assert sorted(shown) == [path.name for path in paths]
    for path in paths:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == f"{_SVG}svg" and len(list(root.iter(f"{_SVG}text"))) > 5
        assert path.stat().st_size < MOST_BYTES


def test_what_is_drawn_takes_what_is_predicted(script: Any) -> None:
    """What a device does and exchanges lies one after the other, and ends when the planner says."""
    panels = sys.modules["panels"]
    for plan, spec, sent in (
        (script.TENSOR, script.PLAIN, (script.SUM,) * 6),
        (script.SEQUENCE, script.PLAIN, (script.KEYS,) * 3),
        (replace(script.BLOCK, originals=("tokens",)), script.DECOUPLED, (script.GATHER, script.EXCHANGE)),
    ):
        drawn = panels.panel_of(plan, spec, script.PIS, sent, parts=("",) * 4, request=TEXT)
        costs = panels.costs_on(spec, TEXT, script.PIS)
        seconds = [Crew(costs).step_s(step, [0.0] * 4) for step in panels.layer_steps(plan, spec, TEXT)]
        assert drawn.end_s == pytest.approx(sum(seconds))
        own = [*drawn.bands, *(block for block in drawn.blocks if block.device == 1)]
        spans = sorted((each.start_s, each.start_s + each.seconds) for each in own)
        assert sum(stop - start for start, stop in spans) == pytest.approx(drawn.end_s)
        assert all(before[1] == pytest.approx(after[0]) for before, after in itertools.pairwise(spans))


def rows(first: str, num_columns: int) -> list[list[str]]:
    """Of the page's table whose first column is so called."""
    lines = PAGE.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert found and all(len(row) == num_columns for row in found)
    return found


def steps_of(name: str, num_devices: int, num_kv_heads: int) -> list[Step]:
    """A layer's, of the way that a row is of."""
    layer_steps = sys.modules["panels"].layer_steps
    spec, way = replace(SPEC, num_layers=4, num_kv_heads=num_kv_heads), re.findall(r"`(\w+)`", name)
    plan = InferencePlan.even(name.split(",")[0], num_devices)
    if plan.strategy == "block":
        plan = replace(plan, originals=(way or ["gather"])[:1])
        steps = layer_steps(plan, spec.decoupled(num_devices, (2,)), TEXT)
        return steps if way else steps[:1]
    steps = layer_steps(replace(plan, algorithm=way[0]) if way else plan, spec, TEXT)
    return steps[: len(steps) // sys.modules["panels"].NUM_LAYERS]


@pytest.mark.parametrize("num_kv_heads", [12, 4])
@pytest.mark.parametrize("num_devices", [2, 4])
def test_the_table_of_bytes_is_what_the_planner_counts(script: Any, num_devices: int, num_kv_heads: int) -> None:
    whole = 4 * TEXT.num_tokens * SPEC.hidden_size
    table = rows("way", 4)
    assert len(table) == 10
    for name, count, formula, kilobytes in table:
        steps = steps_of(name, num_devices, num_kv_heads)
        exchanges = [step.exchange for step in steps if step.exchange is not None]
        sent = max(
            sum(exchange[device].sent_bytes - HEADER_BYTES * exchange[device].num_sent for exchange in exchanges)
            for device in range(num_devices)
        )
        names = {"N": num_devices, "S": whole, "G": num_kv_heads, "D": SPEC.head_size, "H": SPEC.hidden_size}
        expected = eval(formula.replace("−", "-").replace("·", "*"), {}, names)
        assert (len(exchanges), sent) == (int(count), pytest.approx(expected)), name
        if num_devices == 4 and num_kv_heads == SPEC.num_kv_heads:
            assert int(kilobytes) == round(sent / 1e3), name


def test_the_table_of_ways_is_what_the_planner_predicts(script: Any) -> None:
    form = SPEC.decoupled(4, (2, 5, 8, 11))
    for tokens, mbit_per_s, *cells, plain in rows("tokens", 7):
        request, devices = InferenceRequest(num_tokens=int(tokens)), at_bandwidth(script.PIS, float(mbit_per_s) * 1e6)
        question = question_of(form, request, devices)
        even = InferencePlan.even("block", 4)
        found = [
            round(1e3 * predict(question, replace(even, originals=(way,) * 4)).latency_s)
            for way in ("gather", "tokens", "sequence", "tensor")
        ]
        assert cells == [f"**{each}**" if each == min(found) else str(each) for each in found]
        chosen = choose(question_of(SPEC, request, devices)).chosen
        num = len(chosen.plan.devices)
        how = "one device" if num == 1 else chosen.plan.strategy + ("" if num == 4 else f" on {num}")
        assert plain == f"{round(1e3 * chosen.latency_s)}, {how}"
