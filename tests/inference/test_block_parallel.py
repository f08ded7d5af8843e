"""Decoupled models on one device and several: what transformers computes of them, and what the planner says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inference.conftest import CONFIGS, DECODERS, on_devices
from transformers import AutoModel, AutoModelForCausalLM

from isthmus.inference import model
from isthmus.inference.engine import Engine
from isthmus.inference.generation import check_can_generate
from isthmus.inference.kernels import load_kernels
from isthmus.inference.strategies import make_strategy
from isthmus.inference.strategies.base import Tokens
from isthmus.models.decoupled import architectures
from isthmus.models.decoupled.configs import decoupled_config
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import block_parts
from isthmus.planning.pieces import held_bytes, pieces_of
from isthmus.planning.plans import expected_error
from isthmus.planning.workload import passes, workload
from isthmus.spec.errors import IsthmusError
from isthmus.spec.generation import GenerationSettings
from isthmus.spec.inference import CODECS, GENERATING, ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group

assert architectures.CLASSES  # AutoModel knows decoupled models now
NUM_TOKENS = 13
FAMILIES = tuple(family for family in CONFIGS if family != "distilbert")
FORMS: dict[str, dict[str, Any]] = {
    "four": {"num_sub_blocks": 4, "original_layers": [2]},
    "first-original": {"num_sub_blocks": 4, "original_layers": [0, 2]},
    "end-decoupled": {"num_sub_blocks": 4, "original_layers": [1]},
    "middle": {"num_sub_blocks": 4, "original_layers": [0, 1]},
    "two-in-a-row": {"num_sub_blocks": 4, "original_layers": [1, 2]},
    "uneven": {"num_sub_blocks": 3, "original_layers": [2], "sub_block_widths": [4, 12, 16]},
    "own": {"num_sub_blocks": 2, "original_layers": [2], "sub_block_heads": "own"},
}
TEAM_FORMS: dict[str, dict[str, Any]] = {
    "two": {"num_sub_blocks": 2, "original_layers": [1]},
    "two-ways": {"num_sub_blocks": 2, "original_layers": [0, 2]},
    "uneven-ways": {"num_sub_blocks": 3, "original_layers": [0, 2], "sub_block_widths": [4, 12, 16]},
}
"""For more devices than sub-blocks."""
Saved = Callable[[str, str], Path]


@cache
def reference(family: str, form: str) -> Any:
    """The model in plain transformers, with weights of real spread."""
    config = decoupled_config(CONFIGS[family](), (FORMS | TEAM_FORMS)[form])
    kind = AutoModelForCausalLM if family in DECODERS else AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = kind.from_config(config, attn_implementation="eager").eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    return made


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    @cache
    def write(family: str, form: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-{form}")
        reference(family, form).save_pretrained(directory)
        return directory

    return write


def batch(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (2, T), the second sequence padded."""
    ids_BT = torch.randint(3, 99, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, slice(0, 4) if family in DECODERS else slice(9, NUM_TOKENS)] = 0
    return ids_BT.masked_fill(mask_BT == 0, CONFIGS[family]().pad_token_id or 0), mask_BT


def states_of_all(directory: Path, plan: InferencePlan) -> list[torch.Tensor]:
    """What every device computes, (B, T, H) or its tokens of it; of ``bert``."""
    ids_BT, mask_BT = batch("bert")

    def work(group: Group) -> torch.Tensor:
        with torch.inference_mode():
            return make_strategy(plan, ShardReader(directory), group).run(Tokens.of(ids_BT, mask_BT))

    return on_devices(len(plan.devices), work)


def hidden_states(directory: Path, family: str, plan: InferencePlan) -> torch.Tensor:
    ids_BT, mask_BT = batch(family)

    def work(group: Group) -> torch.Tensor | None:
        with Engine(directory, group=group, plan=plan) as engine:
            if engine.is_leader:
                return engine.hidden(ids_BT, mask_BT.bool())[mask_BT.bool()]
            engine.follow()
        return None

    found = on_devices(len(plan.devices), work)[0]
    assert found is not None
    return found


def expected(family: str, form: str) -> torch.Tensor:
    ids_BT, mask_BT = batch(family)
    positions = {"position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)} if family in DECODERS else {}
    with torch.inference_mode():
        output = reference(family, form).base_model(input_ids=ids_BT, attention_mask=mask_BT, **positions)
    return output.last_hidden_state[mask_BT.bool()]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_every_family_is_what_transformers_computes(
    family: str, form: str, num_devices: int, saved: Saved
) -> None:
    got = hidden_states(saved(family, form), family, InferencePlan.even("block", num_devices))
    assert error(got, expected(family, form)) <= 1e-5


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0), (3.0, 0.1), (1.0, 1.0, 2.0)])
def test_devices_may_have_several_sub_blocks(weights: tuple[float, ...], saved: Saved) -> None:
    plan = InferencePlan(strategy="block", devices=tuple(range(len(weights))), weights=weights)
    assert error(hidden_states(saved("bert", "four"), "bert", plan), expected("bert", "four")) <= 1e-5


@pytest.mark.parametrize(("codec", "tolerance"), [("bf16", 0.01), ("int8", 0.02), ("int4", 0.3)])
def test_codecs_round_what_is_exchanged(codec: str, tolerance: float, saved: Saved) -> None:
    got = hidden_states(saved("bert", "four"), "bert", InferencePlan.even("block", 4, codec=codec))
    assert 1e-6 < error(got, expected("bert", "four")) <= tolerance


MIXED = [("int8", "fp32"), ("bf16", "int4"), ("fp32", "int8")]


@pytest.mark.parametrize("codecs", MIXED, ids="-".join)
@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
def test_original_layers_may_have_a_codec_each(first: str, second: str, codecs: tuple[str, str], saved: Saved) -> None:
    """The error is of the size that the planner expects; every device ends with the same bits."""
    plan = InferencePlan(
        strategy="block", devices=(0, 1, 2), weights=(1.0, 2.0, 1.0), originals=(first, second), codecs=codecs
    )
    found, mask_BT = states_of_all(saved("bert", "middle"), plan), batch("bert")[1].bool()
    assert all(torch.equal(each, found[0]) for each in found)
    got = error(found[0][mask_BT], expected("bert", "middle"))
    rounded = expected_error(plan, ShardReader(saved("bert", "middle")).spec, InferenceRequest(num_tokens=NUM_TOKENS))
    assert got <= 1e-5 if not rounded else 1e-5 < got <= 3 * rounded


PLANS: list[tuple[str, tuple[str, ...]]] = [
    *((form, ("gather",)) for form in ("four", "end-decoupled", "uneven")),
    ("first-original", ("gather", "gather")),
    *(("four", (kind,)) for kind in ORIGINAL_PLANS),
    *(("end-decoupled", (kind,)) for kind in ORIGINAL_PLANS),
    *(("two-in-a-row", (first, second)) for first in ORIGINAL_PLANS for second in ORIGINAL_PLANS),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("form", "originals"), PLANS)
def test_the_planner_knows_what_is_sent_and_held(
    form: str, originals: tuple[str, ...], codec: str, saved: Saved
) -> None:
    plan = InferencePlan(
        strategy="block", devices=(0, 1, 2), weights=(0.2, 0.45, 0.6), codec=codec, originals=originals
    )
    check_sent_and_held(saved("bert", form), plan)


def check_sent_and_held(directory: Path, plan: InferencePlan) -> None:
    """Bytes, exchanges and memory of a real run are those of the planner."""
    request = InferenceRequest(num_tokens=NUM_TOKENS, batch=2)
    ids_BT = torch.randint(90, (2, NUM_TOKENS))

    def work(group: Group) -> tuple[int, int, int]:
        with Engine(directory, group=group, plan=plan) as engine:
            [held], before = engine.local_models, engine.stats
            assert before is not None
            if engine.is_leader:
                engine.mean(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
            else:
                engine.follow_once()
            after = engine.stats
            assert after is not None
            found = after.bytes_sent - before.bytes_sent, after.num_exchanges - before.num_exchanges, held.num_bytes
            if not engine.is_leader:
                engine.follow()
            return found

    found = on_devices(len(plan.devices), work)
    spec = ShardReader(directory).spec
    load = workload(plan, spec, request)
    assert tuple(sent for sent, _, _ in found) == load.sent_bytes()
    assert found[0][1] == load.num_exchanges()
    assert [held for _, _, held in found] == [held_bytes(spec, pieces) for pieces in pieces_of(plan, spec)]


@pytest.mark.parametrize("codecs", MIXED, ids="-".join)
@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
@pytest.mark.parametrize("form", ["middle", "two-in-a-row", "first-original"])
def test_the_planner_knows_what_is_sent_where_codecs_differ(
    form: str, first: str, second: str, codecs: tuple[str, str], saved: Saved
) -> None:
    plan = InferencePlan(
        strategy="block", devices=(0, 1, 2), weights=(0.2, 0.45, 0.6), originals=(first, second), codecs=codecs
    )
    check_sent_and_held(saved("bert", form), plan)


def test_what_does_not_fit_is_refused(saved: Saved, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(IsthmusError, match="strategy: got block for a model that is not decoupled; isthmus decouple"):
        hidden_states(checkpoint("bert"), "bert", InferencePlan.even("block", 2))
    with pytest.raises(IsthmusError, match="strategy: got tensor for a decoupled model; take block"):
        hidden_states(saved("bert", "four"), "bert", InferencePlan.even("tensor", 2))
    plan = InferencePlan(strategy="block", devices=(0, 1), weights=(1.0, 1.0), codecs=("int8", "int4"))
    with pytest.raises(IsthmusError, match="codecs: got 2 for 1 original layers, wanted one for each"):
        hidden_states(saved("bert", "four"), "bert", plan)


def test_codecs_are_checked_and_have_one_form() -> None:
    two: dict[str, Any] = {"devices": (0, 1), "weights": (1.0, 1.0)}
    with pytest.raises(ValueError, match="codecs: got 'zip', wanted one of fp32, bf16, int8, int4"):
        InferencePlan(strategy="block", **two, codecs=("int8", "zip"))
    with pytest.raises(ValueError, match="codecs: got 2 for strategy 'tensor', wanted none; name one codec"):
        InferencePlan(strategy="tensor", **two, codecs=("int8", "int4"))
    alike = InferencePlan(strategy="block", **two, codecs=("int8", "int8"))
    assert alike == InferencePlan(strategy="block", **two, codec="int8") and alike.wire == "int8"
    mixed = InferencePlan(strategy="block", **two, codecs=("int8", "int4", "int8"))
    assert mixed.wire == "int8+int4" and from_json(InferencePlan, to_json(mixed)) == mixed
    old = json.loads(to_json(alike))
    del old["codecs"]
    assert from_json(InferencePlan, json.dumps(old)) == alike


def test_sub_blocks_are_shared_out_by_weight(saved: Saved) -> None:
    spec = ShardReader(saved("bert", "four")).spec
    plan = InferencePlan(strategy="block", devices=(0, 1), weights=(1.0, 9.0))
    assert [len(part.sub_blocks) for part in block_parts(plan, spec)] == [1, 3]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.2, 0.45, 0.6), (1.0, 0.0)])
@pytest.mark.parametrize("kind", ORIGINAL_PLANS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("form", ["four", "end-decoupled", "middle"])
def test_original_layers_are_computed_in_every_way(
    form: str, family: str, kind: str, weights: tuple[float, ...], saved: Saved
) -> None:
    num_originals = len(FORMS[form]["original_layers"])
    plan = InferencePlan(
        strategy="block", devices=tuple(range(len(weights))), weights=weights, originals=(kind,) * num_originals
    )
    assert error(hidden_states(saved(family, form), family, plan), expected(family, form)) <= 1e-5


@pytest.mark.parametrize("second", ORIGINAL_PLANS)
@pytest.mark.parametrize("first", ORIGINAL_PLANS)
def test_neighbouring_layers_may_differ_in_their_way(first: str, second: str, saved: Saved) -> None:
    plan = InferencePlan(strategy="block", devices=(0, 1, 2), weights=(1.0, 2.0, 1.0), originals=(first, second))
    assert error(hidden_states(saved("bert", "two-in-a-row"), "bert", plan), expected("bert", "two-in-a-row")) <= 1e-5


def continued(directory: Path, plan: InferencePlan, num_new: int) -> torch.Tensor:
    """The leader's new tokens (2, n), after the prompts of ``batch``."""
    ids_BT, mask_BT = batch("llama")

    def work(group: Group) -> torch.Tensor | None:
        with Engine(directory, group=group, plan=plan) as engine:
            if engine.is_leader:
                return engine.generate_tokens(ids_BT, mask_BT, GenerationSettings(max_new_tokens=num_new))
            engine.follow()
        return None

    found = on_devices(len(plan.devices), work)[0]
    assert found is not None
    return found


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one by what is compiled, and by PyTorch."""
    if request.param == "torch":
        monkeypatch.setattr(model, "load_kernels", lambda: None)
    elif load_kernels() is None:
        pytest.skip("there is no C compiler")


GENERATING_PLANS = {
    "one": InferencePlan.even("single", 1),
    "two": InferencePlan.even("block", 2),
    "two, divided": InferencePlan(strategy="block", devices=(0, 1), weights=(1.0, 1.0), originals=("tensor",)),
    "two uneven, divided": InferencePlan(strategy="block", devices=(0, 1), weights=(3.0, 1.0), originals=("tensor",)),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("plan", GENERATING_PLANS)
@pytest.mark.parametrize("form", ["four", "uneven", "own", "end-decoupled"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_those_of_transformers(family: str, form: str, plan: str, saved: Saved) -> None:
    ids_BT, mask_BT = batch("llama")
    reference_model = reference(family, form)
    config = reference_model.generation_config
    config.eos_token_id, config.pad_token_id = None, 0
    wanted = reference_model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=40, do_sample=False)
    found = continued(saved(family, form), GENERATING_PLANS[plan], 40)
    assert found.tolist() == wanted[:, ids_BT.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["tokens", "sequence", "fastest"])
def test_ways_that_do_not_leave_everything_everywhere_cannot_generate(kind: str, saved: Saved) -> None:
    plan = InferencePlan(strategy="block", devices=(0, 1), weights=(1.0, 1.0), originals=(kind,))
    with pytest.raises(IsthmusError, match=f"originals: got {kind}, wanted gather or tensor to generate"):
        check_can_generate(ShardReader(saved("llama", "four")), plan)


def sent_for_tokens(engine: Engine, ids_BT: torch.Tensor, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bytes, exchanges) that this device sends in a request for each number of new tokens. Followers follow to the
    end."""
    found = []
    for count in counts:
        before = engine.stats
        if engine.is_leader:
            engine.generate_tokens(ids_BT, torch.ones_like(ids_BT), GenerationSettings(max_new_tokens=count))
        else:
            engine.follow_once()
        after = engine.stats
        assert before is not None and after is not None
        found.append((after.bytes_sent - before.bytes_sent, after.num_exchanges - before.num_exchanges))
    if not engine.is_leader:
        engine.follow()
    return found


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("num_sequences", [1, 300])
@pytest.mark.parametrize("form", ["four", "end-decoupled"])
def test_the_planner_knows_what_a_token_sends(form: str, num_sequences: int, kind: str, saved: Saved) -> None:
    """300 sequences are too many for the sums that suit a few values."""
    plan = InferencePlan(strategy="block", devices=(0, 1), weights=(1.0, 1.0), codec="int8", originals=(kind,))
    directory = saved("llama", form)
    ids_BT = torch.randint(3, 90, (num_sequences, 5))

    def work(group: Group) -> list[tuple[int, int]]:
        with Engine(directory, group=group, plan=plan) as engine:
            return sent_for_tokens(engine, ids_BT, (3, 7))

    found = on_devices(2, work)
    request = InferenceRequest(num_tokens=5, batch=num_sequences, num_new_tokens=3)
    [(_, _), (token, count)] = passes(plan, ShardReader(directory).spec, request)
    assert count == 2
    for rank, ((few_bytes, _), (many_bytes, _)) in enumerate(found):
        assert many_bytes - few_bytes == 4 * token.sent_bytes()[rank]
    assert found[0][1][1] - found[0][0][1] == 4 * token.num_exchanges()
