"""Decoupled models on more devices than sub-blocks: teams share one, and all is as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.inference import test_block_parallel as block_parallel
from tests.inference.conftest import on_devices
from tests.inference.test_block_parallel import (
    Saved,
    batch,
    check_sent_and_held,
    continued,
    error,
    expected,
    hidden_states,
    kernels,  # noqa: F401
    reference,
    saved,  # noqa: F401
    sent_for_tokens,
)

from isthmus.inference.engine import Engine
from isthmus.inference.strategies import make_strategy
from isthmus.inference.strategies.base import Tokens
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import block_parts, team_of
from isthmus.planning.device_costs import block_generation_bytes
from isthmus.planning.original_ways import original_shares
from isthmus.planning.plans import expected_error
from isthmus.planning.workload import passes
from isthmus.spec.inference import CODECS, GENERATING, ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.transport.base import Group

FORMS = block_parallel.FORMS | block_parallel.TEAM_FORMS
UNEVEN = (0.2, 0.45, 0.6, 0.1, 1.0, 0.3)


def team_plan(num_devices: int, form: str, kind: str, weights: tuple[float, ...] = (), **options: Any) -> InferencePlan:
    return InferencePlan(
        strategy="block",
        devices=tuple(range(num_devices)),
        weights=weights or (1.0,) * num_devices,
        originals=(kind,) * len(FORMS[form]["original_layers"]),
        **options,
    )


@pytest.mark.parametrize("kind", ORIGINAL_PLANS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(
    ("num_devices", "form"),
    [(3, "two"), (5, "two"), (6, "two"), (8, "two"), (5, "four"), (6, "middle"), (8, "four"), (5, "own")],
)
def test_what_teams_compute_is_what_one_device_does(
    num_devices: int,
    form: str,
    family: str,
    kind: str,
    saved: Saved,  # noqa: F811
) -> None:
    plan = team_plan(num_devices, form, kind)
    assert error(hidden_states(saved(family, form), family, plan), expected(family, form)) <= 1e-5


@pytest.mark.parametrize("weights", [UNEVEN, (0.0, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
def test_teams_may_be_uneven_and_neighbouring_layers_differ(
    first: str,
    second: str,
    weights: tuple[float, ...],
    saved: Saved,  # noqa: F811
) -> None:
    """Slices of 4, 12 and 16 units; and what comes after each way, another way or a decoupled layer."""
    form = "uneven-ways" if len(weights) > 3 else "two-ways"
    plan = InferencePlan(
        strategy="block", devices=tuple(range(len(weights))), weights=weights, originals=(first, second)
    )
    assert error(hidden_states(saved("bert", form), "bert", plan), expected("bert", form)) <= 1e-5


@pytest.mark.parametrize("codecs", [("fp32", "int4"), ("int8", "bf16")], ids="-".join)
@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
@pytest.mark.parametrize("form", ["middle", "first-original"])
def test_the_planner_knows_what_teams_send_and_hold(
    form: str,
    first: str,
    second: str,
    codecs: tuple[str, str],
    saved: Saved,  # noqa: F811
) -> None:
    plan = InferencePlan(
        strategy="block", devices=tuple(range(6)), weights=UNEVEN, originals=(first, second), codecs=codecs
    )
    check_sent_and_held(saved("bert", form), plan)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ORIGINAL_PLANS)
@pytest.mark.parametrize("num_devices", [3, 8])
def test_teams_end_with_the_same_bits_and_the_error_that_is_expected(
    num_devices: int,
    kind: str,
    codec: str,
    saved: Saved,  # noqa: F811
) -> None:
    """Of the form whose decoupled layers come last, so that all that is said of them meets."""
    form = "two" if num_devices == 3 else "four"
    plan = team_plan(num_devices, form, kind, codec=codec)
    reader, (ids_BT, mask_BT) = ShardReader(saved("bert", form)), batch("bert")

    def work(group: Group) -> torch.Tensor:
        team = team_of(plan, reader.spec, group.rank)
        mates = group.subgroup(team) if len(team) > 1 else None
        strategy = make_strategy(plan, ShardReader(saved("bert", form)), group, mates=mates)
        hidden_BtH = strategy.run(Tokens.of(ids_BT, mask_BT))
        ranges = strategy.token_ranges(ids_BT.shape[1])
        if ranges is None:
            return hidden_BtH
        parts = [torch.empty(2, len(part), hidden_BtH.shape[2]) for part in ranges]
        group.all_gather(parts, hidden_BtH.contiguous())
        return torch.cat(parts, dim=1)

    found = on_devices(num_devices, work)
    assert all(torch.equal(each, found[0]) for each in found)
    states, wanted = found[0][mask_BT.bool()], expected("bert", form)
    got = error(states, wanted)
    rounded = expected_error(plan, reader.spec, InferenceRequest(num_tokens=ids_BT.shape[1]))
    assert got <= 1e-5 if codec == "fp32" else 1e-5 < got <= 3 * rounded
    if codec == "int8":
        assert torch.nn.functional.cosine_similarity(states, wanted).min() >= 0.9995


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize(
    ("num_devices", "form"), [(3, "two"), (5, "four"), (8, "four"), (6, "uneven"), (5, "own"), (6, "end-decoupled")]
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_tokens_of_teams_are_those_of_transformers(
    family: str,
    num_devices: int,
    form: str,
    kind: str,
    saved: Saved,  # noqa: F811
) -> None:
    ids_BT, mask_BT = batch("llama")
    model = reference(family, form)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    wanted = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=12, do_sample=False)
    plan = team_plan(num_devices, form, kind, UNEVEN if num_devices == 6 else ())
    assert continued(saved(family, form), plan, 12).tolist() == wanted[:, ids_BT.shape[1] :].tolist()


@pytest.mark.parametrize("num_sequences", [2, 1100])
@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("form", ["four", "end-decoupled"])
def test_bytes_and_caches_of_generating_are_those_of_a_real_run(
    form: str,
    kind: str,
    num_sequences: int,
    saved: Saved,  # noqa: F811
) -> None:
    """1100 sequences are too many for the sums that suit a few values, in teams too."""
    plan, directory = team_plan(6, form, kind, UNEVEN, codec="int8"), saved("llama", form)
    ids_BT = torch.randint(3, 90, (num_sequences, 5))

    def work(group: Group) -> tuple[list[tuple[int, int]], int]:
        with Engine(directory, group=group, plan=plan) as engine:
            [model] = engine.local_models
            layers = [*model.layers, *(block for blocks in model.blocks.values() for block in blocks)]
            found = sent_for_tokens(engine, ids_BT, (3, 5))
            return found, sum(layer.num_cached_heads for layer in layers)

    found = on_devices(6, work)
    spec = ShardReader(directory).spec
    request = InferenceRequest(num_tokens=5, batch=num_sequences, num_new_tokens=3)
    [(_, _), (token, _)] = passes(plan, spec, request)
    shares = zip(block_parts(plan, spec), original_shares(plan, spec), found, strict=True)
    for rank, (part, originals, ([few, many], num_heads)) in enumerate(shares):
        assert many[0] - few[0] == 2 * token.sent_bytes()[rank]
        held = [share for _, share in part.held(spec)]
        cached = block_generation_bytes(spec, held, originals, 0, request, "fp32")
        assert cached == 2 * 4 * num_sequences * (5 + 3) * num_heads * spec.head_size
    [few, many], _ = found[0]
    assert many[1] - few[1] == 2 * token.num_exchanges()
