"""What every transport must do, run against each: threads (``local``), TCP (``sockets``) and gloo."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.transport.groups import KINDS, outcomes, results, run_threads
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.transport import native_sums
from isthmus.transport.base import Algorithm, Group
from isthmus.transport.codec import CODEC_NAMES, create_codec
from isthmus.transport.errors import MismatchError, PeerLostError, TransportError

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.uint8]
pytestmark = pytest.mark.parametrize("kind", KINDS)


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rank's contribution: the same on every thread that asks for it."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(0, 100, (numel,), generator=generator).to(dtype)


def sum_in_order(world_size: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reference: a plain loop over ranks in FP32 (int64 exactly)."""
    total = values(0, numel, dtype)
    total = total.float() if dtype.is_floating_point else total
    for rank in range(1, world_size):
        total = total + values(rank, numel, dtype)
    return total.to(dtype)


# --- collectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_collective_brings_every_value_where_it_belongs(kind: str, world_size: int, dtype: torch.dtype) -> None:
    numels = [5 + 3 * rank for rank in range(world_size)]
    numels[-1] = 0 if world_size > 2 else numels[-1]

    def room(sizes: list[int]) -> list[Tensor]:
        return [torch.zeros(numel, dtype=dtype) for numel in sizes]

    def body(group: Group) -> None:
        rank = group.rank
        own = values(rank, numels[rank], dtype)
        for root in range(world_size):
            sent = values(root, 7, dtype) if rank == root else torch.zeros(7, dtype=dtype)
            group.broadcast(sent, root=root)
            assert torch.equal(sent, values(root, 7, dtype))
            gathered = room(numels)
            group.gather(gathered if rank == root else None, own, root=root)
            for source in range(world_size if rank == root else 0):
                assert torch.equal(gathered[source], values(source, numels[source], dtype))
        for algorithm in ("mesh", "ring"):
            gathered = room(numels)
            group.all_gather(gathered, own, algorithm=algorithm)
            for source in range(world_size):
                assert torch.equal(gathered[source], values(source, numels[source], dtype))
        # What goes from a to b has a + 2·b values.
        outputs = room([source + 2 * rank for source in range(world_size)])
        group.all_to_all(outputs, [values(rank, rank + 2 * to, dtype, seed=to) for to in range(world_size)])
        for source in range(world_size):
            assert torch.equal(outputs[source], values(source, source + 2 * rank, dtype, seed=rank))
        assert torch.equal(own, values(rank, numels[rank], dtype))

    results(kind, world_size, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("numel", [0, 1, 767, 3072, 300_000])
def test_sums_are_in_the_order_of_ranks_in_fp32_bit_for_bit(kind: str, numel: int, dtype: torch.dtype) -> None:
    wanted = sum_in_order(4, numel, dtype)
    sizes = [numel // 2, 0, numel - numel // 2, 0]

    def body(group: Group) -> None:
        for algorithm in ("mesh", "two_step"):
            tensor = values(group.rank, numel, dtype)
            group.all_reduce(tensor, algorithm=algorithm)
            assert torch.equal(tensor, wanted)
        inputs = values(group.rank, numel, dtype).split(sizes)
        output = torch.zeros(sizes[group.rank], dtype=dtype)
        group.reduce_scatter(output, inputs)
        assert torch.equal(output, wanted.split(sizes)[group.rank])
        assert torch.equal(torch.cat(inputs), values(group.rank, numel, dtype))

    results(kind, 4, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("numel", [1, 767, 100_000])
def test_a_ring_gives_every_rank_the_same_bits(kind: str, numel: int, dtype: torch.dtype) -> None:
    sizes = [numel // 3, 0, numel - numel // 3]

    def body(group: Group) -> Tensor:
        tensor = values(group.rank, numel, dtype)
        group.all_reduce(tensor, algorithm="ring")
        scattered = torch.zeros(sizes[group.rank], dtype=dtype)
        group.reduce_scatter(scattered, values(group.rank, numel, dtype).split(sizes), algorithm="ring")
        wanted = sum_in_order(3, numel, dtype)
        close: dict[str, Any] = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-6}
        torch.testing.assert_close(tensor, wanted, **close)
        torch.testing.assert_close(scattered, wanted.split(sizes)[group.rank], **close)
        return tensor

    first, *others = results(kind, 3, body)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("numel", [0, 1, 767, 100_000])
def test_doubling_adds_pairs_of_pairs_the_same_bits_on_every_rank(
    kind: str, world_size: int, numel: int, dtype: torch.dtype
) -> None:
    parts = [values(rank, numel, dtype) for rank in range(world_size)]
    while len(parts) > 1:
        parts = [parts[index] + parts[index + 1] for index in range(0, len(parts), 2)]

    def body(group: Group) -> None:
        tensor = values(group.rank, numel, dtype)
        group.all_reduce(tensor, algorithm="doubling")
        assert torch.equal(tensor, parts[0])

    results(kind, world_size, body)


@pytest.fixture(params=["native", "python"])
def kind_of_sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated sums over sockets by what is compiled, and without."""
    if request.param == "python":
        monkeypatch.setattr(native_sums, "add_up", lambda: None)
    elif native_sums.add_up() is None:
        pytest.skip("there is no C compiler")


@pytest.mark.usefixtures("kind_of_sums")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("numel", [0, 1, 767, 12_000, 100_000])
def test_a_repeated_sum_is_the_all_reduce_that_it_stands_for(kind: str, world_size: int, numel: int) -> None:
    algorithm: Algorithm = "mesh" if world_size == 3 else "doubling"

    def body(group: Group) -> None:
        add_up = group.repeated_sum(numel)
        for turn in range(3):
            wanted = values(group.rank, numel, seed=turn)
            before = group.stats
            group.all_reduce(wanted, algorithm=algorithm)
            between = group.stats
            add_up.values.copy_(values(group.rank, numel, seed=turn))
            add_up()
            after = group.stats
            assert torch.equal(add_up.values, wanted)
            assert after.num_exchanges - between.num_exchanges == between.num_exchanges - before.num_exchanges
            assert after.bytes_sent - between.bytes_sent == between.bytes_sent - before.bytes_sent
            assert after.bytes_received - between.bytes_received == between.bytes_received - before.bytes_received

    results(kind, world_size, body)


@pytest.mark.usefixtures("kind_of_sums")
def test_one_rank_may_ask_for_a_repeated_sum_and_the_other_for_an_all_reduce(kind: str) -> None:
    def body(group: Group) -> None:
        add_up = group.repeated_sum(100)
        add_up.values.copy_(values(group.rank, 100))
        if group.rank:
            add_up()
        else:
            group.all_reduce(add_up.values, algorithm="doubling")
        assert torch.equal(add_up.values, values(0, 100) + values(1, 100))

    results(kind, 2, body)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_doubling_with_a_codec_gives_every_rank_the_same_bits(kind: str, codec: str) -> None:
    def body(group: Group) -> Tensor:
        tensor, wanted = values(group.rank, 1000), values(group.rank, 1000)
        group.all_reduce(tensor, codec=codec, algorithm="doubling")
        group.all_reduce(wanted)
        assert (tensor - wanted).abs().max() <= {"fp32": 1e-5, "bf16": 0.1, "int8": 0.2, "int4": 4}[codec]
        return tensor

    first, *others = results(kind, 4, body)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("numel", [0, 1, 100, 70_001])
def test_a_codec_encodes_each_value_once_and_all_ranks_agree(kind: str, codec: str, numel: int) -> None:
    numels = [numel, numel // 2, 0]

    def seen(tensor: Tensor) -> Tensor:
        coder = create_codec(codec)
        encoded, decoded = torch.empty(coder.num_bytes(tensor.numel()), dtype=torch.uint8), torch.empty_like(tensor)
        coder.encode(tensor, encoded)
        coder.decode(encoded, decoded)
        return decoded

    def body(group: Group) -> Tensor:
        rank = group.rank
        for algorithm in ("mesh", "ring"):
            outputs = [torch.zeros(each) for each in numels]
            group.all_gather(outputs, values(rank, numels[rank]), codec=codec, algorithm=algorithm)
            for source in range(3):
                assert torch.equal(outputs[source], seen(values(source, numels[source])))
        tensor = values(rank, numel)
        group.all_reduce(tensor, codec=codec)
        assert torch.equal(tensor, seen(values(0, numel)) + seen(values(1, numel)) + seen(values(2, numel)))
        shares = values(rank, sum(numels)).split(numels)
        scattered = torch.zeros(numels[rank])
        group.reduce_scatter(scattered, shares, codec=codec)
        wanted = [seen(values(source, sum(numels)).split(numels)[rank]) for source in range(3)]
        assert torch.equal(scattered, wanted[0] + wanted[1] + wanted[2])
        exchanged = [torch.zeros(numels[rank]) for _ in range(3)]
        group.all_to_all(exchanged, shares, codec=codec)
        assert all(torch.equal(exchanged[source], wanted[source]) for source in range(3))
        sent = values(1, numel) if rank == 1 else torch.zeros(numel)
        group.broadcast(sent, root=1, codec=codec)
        assert torch.equal(sent, seen(values(1, numel)))
        gathered = [torch.zeros(each) for each in numels]
        group.gather(gathered if rank == 2 else None, values(rank, numels[rank]), root=2, codec=codec)
        assert rank != 2 or all(torch.equal(gathered[r], seen(values(r, numels[r]))) for r in range(3))
        again = values(rank, numel)
        group.all_reduce(again, codec=codec, algorithm="two_step")
        return again

    first, *others = results(kind, 3, body)
    assert all(torch.equal(first, other) for other in others)


def test_two_ranks_send_and_receive_with_tags_while_others_do_not_take_part(kind: str) -> None:
    def body(group: Group) -> None:
        got = torch.zeros(3)
        if group.rank == 0:
            group.send(values(0, 3), 2, tag=7)
            group.recv(got, 2, tag=65535)
            assert torch.equal(got, values(2, 3))
        if group.rank == 2:
            group.recv(got, 0, tag=7)
            group.send(values(2, 3), 0, tag=65535)
            assert torch.equal(got, values(0, 3))
        group.all_reduce(got)

    results(kind, 3, body)


@pytest.mark.parametrize("num_bytes", [64 << 10, 4 << 20, pytest.param(64 << 20, marks=pytest.mark.long)])
def test_large_messages_of_all_to_all_at_once_do_not_deadlock(kind: str, num_bytes: int) -> None:
    numel = num_bytes // 8

    def body(group: Group) -> None:
        tensor = torch.arange(numel) + group.rank
        outputs = [torch.zeros(numel, dtype=torch.int64) for _ in range(3)]
        group.all_gather(outputs, tensor)
        for source in range(3):
            assert torch.equal(outputs[source] - source, outputs[0])
            assert outputs[source][-1] == numel - 1 + source

    results(kind, 3, body)


@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_calls_match_by_their_order_however_fast_ranks_are(kind: str, seed: int) -> None:
    script = random.Random(seed)
    calls = [(script.choice(["reduce", "gather", "cast"]), script.choice([0, 3, 1000, 40_000])) for _ in range(12)]

    def body(group: Group) -> None:
        pace = random.Random(seed + group.rank)
        for number, (name, numel) in enumerate(calls):
            time.sleep(pace.choice([0, 0, 0.002]))
            tensor = torch.full((numel,), float(number + group.rank))
            if name == "reduce":
                group.all_reduce(tensor)
                assert torch.equal(tensor, torch.full((numel,), 3.0 * number + 3))
            elif name == "gather":
                outputs = [torch.zeros(numel) for _ in range(3)]
                group.all_gather(outputs, tensor)
                assert all(torch.equal(outputs[r], torch.full((numel,), float(number + r))) for r in range(3))
            else:
                group.broadcast(tensor, root=number % 3)
                assert torch.equal(tensor, torch.full((numel,), float(number + number % 3)))

    results(kind, 3, body)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_used_at_once_do_not_mix(kind: str) -> None:
    def body(group: Group) -> None:
        with group.subgroup([0, 1, 2]) as other, group.subgroup([0, 1, 2]) as third:

            def work(used: Group, offset: int) -> None:
                for number in range(30):
                    tensor = torch.full((200 * offset,), float(used.rank + number + offset))
                    used.all_reduce(tensor)
                    assert torch.equal(tensor, torch.full((200 * offset,), 3.0 * (number + offset) + 3))

            found = run_threads(
                [lambda: work(group, 1), lambda: work(other, 2), lambda: work(third, 3)],
            )
            assert found == [None, None, None]

    results(kind, 3, body)


def test_subgroups_number_their_ranks_anew_and_end_by_themselves(kind: str) -> None:
    def body(group: Group) -> None:
        members = [0, 2, 3] if group.rank != 1 else [1]
        with group.subgroup(members) as part:
            assert part.world_size == len(members) and members[part.rank] == group.rank
            assert part.global_ranks == tuple(members)
            tensor = torch.tensor([float(group.rank)])
            part.all_reduce(tensor)
            assert tensor.item() == sum(members)
            if group.rank != 1:
                with part.subgroup([1, 2]) if part.rank else part.subgroup([0]) as inner:
                    assert inner.global_ranks == ((2, 3) if part.rank else (0,))
                    tensor.fill_(1.0)
                    inner.all_reduce(tensor)
                    assert tensor.item() == inner.world_size
        tensor = torch.ones(1)
        group.all_reduce(tensor)
        assert tensor.item() == 4

    results(kind, 4, body)


def test_a_failed_subgroup_names_ranks_of_the_first_group(kind: str) -> None:
    def body(group: Group) -> None:
        with group.subgroup([1, 2]) if group.rank else group.subgroup([0]) as part:
            part.all_reduce(torch.ones(1))  # or 2 may be gone before 1 has met it
            if group.rank != 2:
                part.all_reduce(torch.ones(1))

    zero, one, two = outcomes(kind, 3, body)
    assert zero is None and two is None
    assert isinstance(one, PeerLostError) and one.ranks == (2,)


# --- asynchronous calls -----------------------------------------------------------------------------------------------


def test_a_started_call_runs_while_the_caller_computes(kind: str) -> None:
    def body(group: Group) -> None:
        go = threading.Event()
        first, second = torch.ones(4), torch.ones(100_000)

        def held(tensor: Tensor) -> None:
            assert go.wait(30)
            group.all_reduce(tensor)

        handles = [group.start(held, first), group.start(group.all_reduce, second, codec="int8")]
        assert not any(handle.is_done() for handle in handles)
        assert torch.equal(first, torch.ones(4)), "the caller is not held up"
        go.set()
        third = torch.ones(3)
        group.all_reduce(third)  # comes after what was started
        assert all(handle.is_done() for handle in handles)
        for handle in handles:
            handle.wait()
        assert (first == 3).all() and (third == 3).all()
        torch.testing.assert_close(second, torch.full_like(second, 3.0), rtol=0.02, atol=0)

    results(kind, 3, body)


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("numel", [70, 100_000])
def test_started_exchanges_bring_what_blocking_ones_do(kind: str, numel: int, codec: str | None) -> None:
    """Each has its own when it is waited for, though they share a group's memory."""

    def body(group: Group) -> None:
        def outputs() -> list[Tensor]:
            return [torch.empty(numel) for _ in range(3)]

        own = [values(group.rank, numel, seed=seed) for seed in range(3)]
        wanted, found = [outputs() for _ in own], [outputs() for _ in own]
        for tensors, tensor in zip(wanted, own, strict=True):
            group.all_gather(tensors, tensor, codec=codec)
        handles = [
            group.start(group.all_gather, tensors, tensor, codec=codec)
            for tensors, tensor in zip(found[:2], own, strict=False)
        ]
        handles.append(group.start(group.all_to_all, found[2], [own[2]] * 3, codec=codec))
        before = [tensor.clone() for tensor in own]
        for handle, got, tensors in zip(handles, found, wanted, strict=True):
            handle.wait()
            assert all(map(torch.equal, got, tensors))
        assert all(map(torch.equal, own, before))

    results(kind, 3, body)


def test_a_rank_that_leaves_amid_started_exchanges_is_lost_to_who_waits_for_them(kind: str) -> None:
    """Every one that is waited for raises, the first with what has happened."""

    def body(group: Group) -> None:
        first, second = ([torch.empty(70) for _ in range(3)] for _ in range(2))
        handles = [group.start(group.all_gather, first, torch.zeros(70))]
        handles[0].wait()
        if group.rank == 1:
            return
        handles = [group.start(group.all_gather, outputs, torch.zeros(70)) for outputs in (first, second)]
        with pytest.raises(PeerLostError) as met:
            handles[0].wait()
        with pytest.raises(TransportError):
            handles[1].wait()
        raise met.value

    zero, one, two = outcomes(kind, 3, body, timeout_s=10)
    assert one is None
    assert isinstance(zero, PeerLostError) and isinstance(two, PeerLostError)
    assert 1 in zero.ranks + two.ranks


def test_a_started_call_raises_where_it_is_waited_for(kind: str) -> None:
    def body(group: Group) -> None:
        handle = group.start(group.all_gather, [torch.zeros(1)], torch.zeros(1))
        with pytest.raises(IsthmusError, match="outputs: got 1 tensors, wanted 2"):
            handle.wait()

    results(kind, 2, body)


def test_inference_tensors_are_written_to_from_any_thread(kind: str) -> None:
    def body(group: Group) -> None:
        with torch.inference_mode():
            tensor = torch.ones(130)
        group.start(group.all_reduce, tensor, codec="int4").wait()
        group.all_reduce(tensor, codec="int4")
        other = torch.ones(130)
        group.all_reduce(other, codec="int4")
        assert (tensor - 4).abs().max() < 1 and (other - 2).abs().max() < 0.5

    results(kind, 2, body)


def test_no_thread_is_left_after_close(kind: str) -> None:
    before = set(threading.enumerate())

    def body(group: Group) -> None:
        group.start(group.all_reduce, torch.ones(1)).wait()
        group.close()
        group.close()
        for call in (group.start, lambda method, tensor: method(tensor)):
            with pytest.raises(TransportError, match="closed"):
                call(group.all_reduce, torch.ones(1))

    results(kind, 2, body)
    assert set(threading.enumerate()) == before


# --- counting ---------------------------------------------------------------------------------------------------------


def test_stats_count_what_the_algorithms_send(kind: str) -> None:
    numel, size = 64 * 4 * 10, 4

    def counted(group: Group, call: Callable[[], None]) -> tuple[int, int, int]:
        before = group.stats
        call()
        after = group.stats
        assert after.waited_s > before.waited_s
        return (
            after.num_exchanges - before.num_exchanges,
            after.bytes_sent - before.bytes_sent,
            after.bytes_received - before.bytes_received,
        )

    def body(group: Group) -> None:
        tensor = torch.ones(numel)
        one = (size - 1) * (4 * numel + 16)
        assert counted(group, lambda: group.all_reduce(tensor)) == (1, one, one)
        two = 2 * (size - 1) * (numel + 16)
        assert counted(group, lambda: group.all_reduce(tensor, algorithm="two_step")) == (2, two, two)
        assert counted(group, lambda: group.all_reduce(tensor, algorithm="ring")) == (6, two, two)
        doubled = 2 * (4 * numel + 16)
        assert counted(group, lambda: group.all_reduce(tensor, algorithm="doubling")) == (2, doubled, doubled)
        int8 = (size - 1) * (numel * 66 // 64 + 16)
        assert counted(group, lambda: group.all_reduce(tensor, codec="int8")) == (1, int8, int8)

    results(kind, size, body)


def test_a_steady_state_uses_the_same_memory_again(kind: str) -> None:
    def body(group: Group) -> None:
        tensor = torch.ones(1000)
        addresses = []
        for _ in range(3):
            for codec in (None, "int8"):
                group.all_reduce(tensor, codec=codec)
            addresses.append({name: arena.data_ptr() for name, arena in group.scratch._arenas.items()})
        assert addresses[0] and addresses[0] == addresses[1] == addresses[2]

    results(kind, 3, body)


# --- wrong calls ------------------------------------------------------------------------------------------------------


def test_calls_that_do_not_match_are_told_apart_and_end_on_every_rank(kind: str) -> None:
    def different_operation(group: Group) -> None:
        tensors = [torch.zeros(4) for _ in range(3)]
        group.all_gather(tensors, tensors[0]) if group.rank == 1 else group.all_reduce(torch.zeros(4))

    def different_size(group: Group) -> None:
        group.all_reduce(torch.zeros(5 if group.rank == 1 else 4))

    def different_dtype(group: Group) -> None:
        group.all_reduce(torch.zeros(4, dtype=torch.bfloat16) if group.rank == 1 else torch.zeros(2))

    def different_codec(group: Group) -> None:
        group.all_reduce(torch.zeros(64), codec="int4" if group.rank == 1 else "int8")

    def skipped_call(group: Group) -> None:
        if group.rank != 1:
            group.broadcast(torch.zeros(4), root=0)
        group.broadcast(torch.zeros(4), root=2)
        group.all_reduce(torch.zeros(1))

    def wrong_root(group: Group) -> None:
        group.broadcast(torch.zeros(4), root=1 if group.rank == 1 else 0)
        group.all_reduce(torch.zeros(1))

    for body in (different_operation, different_size, different_dtype, different_codec, skipped_call, wrong_root):
        found = outcomes(kind, 3, body, timeout_s=2)
        # gloo's sends wait for their receiver: of two that wait for each other only the time limit tells.
        is_told = kind != "gloo" or body is not wrong_root
        assert any(isinstance(error, MismatchError) for error in found) or not is_told, (body.__name__, found)
        assert all(isinstance(error, TransportError) for error in found), (body.__name__, found)


def test_after_an_error_the_group_says_so_at_once(kind: str) -> None:
    def body(group: Group) -> None:
        with pytest.raises(TransportError):
            group.all_reduce(torch.zeros(1 + group.rank))
        with pytest.raises(TransportError, match="failed before"):
            group.all_reduce(torch.zeros(1))

    results(kind, 2, body, timeout_s=5)


WRONG: list[tuple[Callable[[Any], None], str]] = [
    (lambda g: g.all_reduce(torch.zeros(4, 4).t()), "contiguous"),
    (lambda g: g.all_reduce(torch.zeros(4, dtype=torch.float64)), "got torch.float64"),
    (lambda g: g.all_reduce(torch.zeros(4, requires_grad=True)), "without gradient"),
    (lambda g: g.all_reduce(torch.zeros(4, dtype=torch.int8)), "to sum"),
    (lambda g: g.all_reduce(torch.zeros(4), codec="int3"), "codec: got 'int3', wanted one of fp32"),
    (lambda g: g.all_reduce(torch.zeros(4, dtype=torch.bfloat16), codec="int8"), "send them without"),
    (lambda g: g.all_reduce(torch.zeros(4), algorithm="tree"), "algorithm: got 'tree', wanted one of mesh"),
    (lambda g: g.all_reduce(torch.zeros(4), codec="int8", algorithm="ring"), "round sums once per hop"),
    (lambda g: g.all_reduce(torch.zeros(4, dtype=torch.bfloat16), algorithm="doubling"), "no bfloat16: use mesh"),
    (lambda g: g.all_gather([torch.zeros(4)] * 3, torch.zeros(4)), "outputs: got 3 tensors, wanted 2"),
    (lambda g: g.all_gather([torch.zeros(4)] * 2, torch.zeros(5)), "got 4 values, wanted this rank's 5"),
    (lambda g: g.all_gather([torch.zeros(4)] * 2, torch.zeros(4, dtype=torch.int8)), "wanted one dtype"),
    (lambda g: g.all_to_all([], []), "inputs: got none"),
    (lambda g: g.all_to_all([torch.zeros(1)] * 2, [torch.zeros(2)] * 2), "make room"),
    (lambda g: g.gather(None, torch.zeros(4), root=g.rank), "outputs: got 0 tensors"),
    (lambda g: g.broadcast(torch.zeros(4), root=2), "root: got rank 2"),
    (lambda g: g.send(torch.zeros(4), g.rank), "to: got this rank itself"),
    (lambda g: g.recv(torch.zeros(4), 1 - g.rank, tag=65536), "tag: got 65536"),
    (lambda g: g.subgroup([1, 0]), "wanted ascending"),
    (lambda g: g.subgroup([1 - g.rank]), "only members"),
]


def test_wrong_arguments_are_refused_before_anything_is_sent(kind: str) -> None:
    def body(group: Group) -> None:
        for call, message in WRONG:
            with pytest.raises(IsthmusError, match=message):
                call(group)
        assert group.stats.num_exchanges == 0
        tensor = torch.ones(1)
        group.all_reduce(tensor)
        assert tensor.item() == 2

    results(kind, 2, body)


def test_two_threads_in_one_group_are_refused(kind: str) -> None:
    def body(group: Group) -> None:
        if group.rank == 0:
            peer_is_asked = threading.Thread(target=group.recv, args=(torch.zeros(1), 1))
            peer_is_asked.start()
            while not group._in_use.locked():
                time.sleep(0.001)
            with pytest.raises(TransportError, match="two threads"):
                group.recv(torch.zeros(1), 1)
            with group.subgroup([0]) as alone:
                alone.all_reduce(torch.zeros(1))
            done.set()
            peer_is_asked.join()
        else:
            assert done.wait(30)
            group.send(torch.zeros(1), 0)

    done = threading.Event()
    results(kind, 2, body)


# --- peers that are lost ----------------------------------------------------------------------------------------------


def test_a_rank_that_leaves_ends_all_others(kind: str) -> None:
    def body(group: Group) -> None:
        group.all_reduce(torch.zeros(1))
        if group.rank != 1:
            while True:
                group.all_reduce(torch.zeros(1))

    zero, one, two = outcomes(kind, 3, body, timeout_s=10)
    assert one is None
    assert isinstance(zero, PeerLostError) and isinstance(two, PeerLostError)
    assert 1 in zero.ranks + two.ranks and zero.exit_code != 0


def test_who_waits_for_one_that_waits_for_a_lost_one_learns_which_it_was(kind: str) -> None:
    def body(group: Group) -> None:
        group.all_reduce(torch.zeros(1))
        if group.rank != 3:
            group.recv(torch.zeros(1), group.rank + 1)

    *waiting, last = outcomes(kind, 4, body, timeout_s=10)
    assert last is None
    for rank, error in enumerate(waiting):
        assert isinstance(error, PeerLostError)
        # gloo has no goodbye: it names the one that was waited for.
        assert error.ranks == ((rank + 1,) if kind == "gloo" else (3,))


def test_a_rank_that_hangs_is_named_within_the_time_limit(kind: str) -> None:
    ended = threading.Barrier(3)

    def body(group: Group) -> None:
        group.all_reduce(torch.zeros(1))
        try:
            if group.rank != 2:
                group.all_reduce(torch.zeros(1))
        finally:
            ended.wait(30)

    zero, one, two = outcomes(kind, 3, body, timeout_s=0.5)
    assert two is None
    assert isinstance(zero, PeerLostError) and isinstance(one, PeerLostError)
    assert 2 in zero.ranks + one.ranks


@pytest.mark.usefixtures("kind_of_sums")
def test_a_repeated_sum_tells_of_peers_that_leave_hang_or_do_something_else(kind: str) -> None:
    ended = threading.Barrier(2)

    def leaves(group: Group) -> None:
        add_up = group.repeated_sum(100)
        add_up()
        if group.rank == 0:
            add_up()

    def hangs(group: Group) -> None:
        try:
            if group.rank == 0:
                group.repeated_sum(100)()
        finally:
            ended.wait(30)

    def does_something_else(group: Group) -> None:
        group.repeated_sum(100 + group.rank)()

    for body, wanted, message in (
        (leaves, PeerLostError, "rank 1"),
        (hangs, PeerLostError, "rank 1"),
        (does_something_else, TransportError, "rank"),
    ):
        error, _ = outcomes(kind, 2, body, timeout_s=1)
        assert isinstance(error, wanted), (body.__name__, error)
        assert message in str(error)


def test_waiting_between_calls_is_no_fault(kind: str) -> None:
    def body(group: Group) -> None:
        with group.subgroup([0, 1]) as other:
            for used in (group, other):
                used.all_reduce(torch.zeros(1))
            time.sleep(1.0)
            for used in (group, other):
                used.all_reduce(torch.zeros(1))

    results(kind, 2, body, timeout_s=0.5)


def test_closing_ends_a_call_that_is_under_way(kind: str) -> None:
    def body(group: Group) -> None:
        if group.rank == 0:
            handle = group.start(group.recv, torch.zeros(1), 1)
            while not group._in_use.locked():
                time.sleep(0.001)
            group.close()
            with pytest.raises(TransportError):
                handle.wait()
            done.set()
        else:
            assert done.wait(30), "rank 0 would see this rank leave instead"

    done = threading.Event()
    results(kind, 2, body, timeout_s=3)
