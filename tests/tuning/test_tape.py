"""A border between processes changes no gradient: what one tape sends, another receives, and gradients come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.tuning.tape import Received, Segment, Sent, Tape

INPUTS = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(3, 3, generator=generator)) for _ in range(2)]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def cross(sender: Tape, receiver: Tape, value: Tensor, number: int = 0) -> Tensor:
    """What stands for ``value`` in the receiver's forward: a ghost."""
    (leaving,) = sender.send([value], to=1, number=number, are_differentiable=[True])
    received = leaving.clone()
    receiver.receive([received], source=0, number=number, are_differentiable=[True])
    ghost = torch.full_like(received, torch.nan)
    receiver.stand_in(ghost, received)
    return ghost


def pop_back(sender: Tape, receiver: Tape) -> None:
    received, sent = receiver.segments.pop(), sender.segments.pop()
    assert isinstance(received, Received) and isinstance(sent, Sent) and received.number == sent.number
    sent.finish(received.gradients())


def test_gradients_are_those_of_one_graph() -> None:
    weight, other = parameters()
    ((INPUTS @ weight).tanh() @ other).sum().backward()
    wanted = [gradient_of(weight), gradient_of(other)]

    weight, other = parameters()
    first, second = Tape(recording=True), Tape(recording=True)
    ghost = cross(first, second, (INPUTS @ weight).tanh())
    returned = second.run_layer(0, lambda hidden: hidden @ other, (ghost,), {})
    assert isinstance(returned, Tensor)
    second.loss = returned.sum()
    second.backward_loss(1.0)
    segment = second.segments.pop()
    assert isinstance(segment, Segment)
    segment.finish(None, None)
    pop_back(first, second)
    assert torch.equal(gradient_of(weight), wanted[0]) and torch.equal(gradient_of(other), wanted[1])
    assert not first.segments and not second.segments


def test_what_is_sent_twice_gets_both_gradients() -> None:
    weight, _ = parameters()
    (3 * (INPUTS @ weight).tanh() + 4 * (INPUTS @ weight).tanh()).sum().backward()
    wanted = gradient_of(weight)

    weight, _ = parameters()
    first, second = Tape(recording=True), Tape(recording=True)
    value = (INPUTS @ weight).tanh()
    returned = [
        second.run_layer(number, lambda hidden, number=number: (3 + number) * hidden, (ghost,), {})
        for number, ghost in enumerate([cross(first, second, value, 0), cross(first, second, value, 1)])
    ]
    second.loss = sum(part.sum() for part in returned if isinstance(part, Tensor))  # pyright: ignore
    second.backward_loss(1.0)
    segments = [second.segments.pop(), second.segments.pop()]
    received = [second.segments.pop(), second.segments.pop()]
    for segment in segments:
        assert isinstance(segment, Segment)
        segment.finish(None, None)
    for got in received:
        sent = first.segments.pop()
        assert isinstance(got, Received) and isinstance(sent, Sent)
        sent.finish(got.gradients())
    torch.testing.assert_close(gradient_of(weight), wanted)


def test_what_nothing_depends_on_sends_zeros_back() -> None:
    first, second = Tape(recording=True), Tape(recording=True)
    weight, _ = parameters()
    cross(first, second, INPUTS @ weight)
    pop_back(first, second)
    assert not gradient_of(weight).any()


def test_a_tensor_that_unexpectedly_needs_no_gradient_is_not_sent() -> None:
    with pytest.raises(RuntimeError, match="border 5: other tensors need gradients"):
        Tape(recording=True).send([INPUTS], to=1, number=5, are_differentiable=[True])


def test_evaluation_keeps_nothing_but_what_stands_for_ghosts() -> None:
    weight, _ = parameters()
    first, second = Tape(recording=False), Tape(recording=False)
    ghost = cross(first, second, INPUTS @ weight)
    returned = second.run_layer(0, lambda hidden: hidden, (ghost,), {})
    assert isinstance(returned, Tensor) and torch.equal(returned, INPUTS @ weight)
    assert not first.segments and not second.segments
