"""One micro-batch's forward pass, cut into segments whose backward can run piece by piece.

A Transformer runs as its authors wrote it; this module only cuts the autograd graph, at the borders of every layer and
around the routed experts inside it. Backward then proceeds layer by layer under the engine's control: the experts'
backward is not part of any autograd graph, so it can run elsewhere, later, or for several micro-batches together.

A layer's segment is ``inputs → … → (hidden, weights) → [experts] → output → … → outputs``. Its backward has two parts:
``gradient_of_experts_output`` (from the outputs to what the experts returned: usually one addition) and, once the
experts' own backward is in, ``finish`` (everything else).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(slots=True)
class Cut:
    """A point where the graph is cut: ``root`` ends one segment, ``leaf`` (same values) starts another and collects its
    gradient."""

    root: Tensor
    leaf: Tensor


@dataclass(slots=True)
class ExpertsCall:
    """What one micro-batch asks of one layer's routed experts. ``hidden`` (T, H), ``index`` (T, k) int64, ``weights``
    (T, k)."""

    layer: int
    module: torch.nn.Module
    hidden: Tensor
    index: Tensor
    weights: Tensor
    output: Tensor | None = None
    """(T, H), set when the experts have run; a leaf that collects its gradient."""


@dataclass(slots=True)
class Segment:
    """One layer of one micro-batch."""

    layer: int
    entering: list[Cut] = field(default_factory=list)
    """Cuts made for this layer's inputs that come from outside every layer (embeddings, an encoder's output)."""
    outputs: list[Cut] = field(default_factory=list)
    routers: list[Cut] = field(default_factory=list)
    """Router logits that an auxiliary loss outside the layer reads."""
    experts: ExpertsCall | None = None

    def _ends(self) -> tuple[list[Tensor], list[Tensor]]:
        cuts = [cut for cut in (*self.outputs, *self.routers) if cut.leaf.grad is not None]
        return [cut.root for cut in cuts], [cut.leaf.grad for cut in cuts if cut.leaf.grad is not None]

    def gradient_of_experts_output(self) -> Tensor | None:
        """d loss / d experts' output, shape (T, H); None when nothing depends on it. Keeps the graph for ``finish``."""
        if self.experts is None or self.experts.output is None:
            return None
        roots, gradients = self._ends()
        if not roots:
            return None
        (gradient,) = torch.autograd.grad(roots, [self.experts.output], gradients, retain_graph=True, allow_unused=True)
        return gradient

    def finish(self, hidden_gradient: Tensor | None, weights_gradient: Tensor | None) -> None:
        """Accumulates into parameters and into the leaves of earlier segments; frees this segment's graph."""
        roots, gradients = self._ends()
        call = self.experts
        if call is not None:
            for root, gradient in ((call.hidden, hidden_gradient), (call.weights, weights_gradient)):
                if root.requires_grad and gradient is not None:
                    roots.append(root)
                    gradients.append(gradient)
        if roots:
            torch.autograd.backward(roots, gradients)
        entering = [cut for cut in self.entering if cut.leaf.grad is not None]
        if entering:
            torch.autograd.backward([cut.root for cut in entering], [cut.leaf.grad for cut in entering])
        self.outputs, self.routers, self.entering, self.experts = [], [], [], None


@dataclass(slots=True)
class Sent:
    """Tensors that left for another process, ``to``, whose backward sends their gradients back."""

    to: int
    number: int
    """Of the border (see ``pipeline.route``), the same on both sides."""
    leaves: list[Tensor] = field(default_factory=list)
    entering: list[Cut] = field(default_factory=list)

    def finish(self, gradients: list[Tensor]) -> None:
        """Accumulates what came back into the leaves of earlier segments and, through gaps, into parameters."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        torch.autograd.backward([cut.root for cut in self.entering], [cut.leaf.grad for cut in self.entering])
        self.leaves, self.entering = [], []


@dataclass(slots=True)
class Received:
    """Tensors that came from another process: leaves whose gradients go back to it."""

    source: int
    number: int
    leaves: list[Tensor]

    def gradients(self) -> list[Tensor]:
        """Zeros where nothing depends on a tensor."""
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]


class Tape:
    """The segments of one micro-batch in the order they ran, and what crossed to and from other processes between them.
    With ``recording`` False (evaluation) nothing is cut or kept."""

    def __init__(self, *, recording: bool) -> None:
        self.recording = recording
        self.segments: list[Segment | Sent | Received] = []
        self.loss: Tensor | None = None
        self._current: Segment | None = None
        self._leaves: dict[int, Cut] = {}

    def _cut(self, value: Tensor) -> Cut:
        return Cut(root=value, leaf=value.detach().requires_grad_())

    def _enter(self, value: object, segment: Segment | Sent) -> object:
        if not isinstance(value, Tensor):
            return value
        cut = self._leaves.get(id(value))
        if cut is None:
            if not self.recording or not value.requires_grad or value.is_leaf:
                return value
            cut = self._leaves[id(value)] = self._cut(value)
            segment.entering.append(cut)
        return cut.leaf

    def _leave(self, value: object, segment: Segment) -> object:
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
            return value
        cut = self._cut(value)
        segment.outputs.append(cut)
        return cut.leaf

    def run_layer(self, layer: int, forward: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """Runs one layer as a segment of its own and returns what it returned, cut from its graph."""
        segment = Segment(layer=layer)
        if self.recording or self._leaves:
            args, kwargs = pytree.tree_map(lambda value: self._enter(value, segment), (args, kwargs))
        if not self.recording:
            return forward(*args, **kwargs)
        self._current = segment
        try:
            returned = forward(*args, **kwargs)
        finally:
            self._current = None
        self.segments.append(segment)
        return pytree.tree_map(lambda value: self._leave(value, segment), returned)

    def cut_router_logits(self, logits: Tensor) -> Tensor:
        """What an auxiliary loss may read of a router: the same values, cut from the layer's graph."""
        if not self.recording or self._current is None or not logits.requires_grad:
            return logits
        cut = self._cut(logits)
        self._current.routers.append(cut)
        return cut.leaf

    def send(self, values: list[Tensor], *, to: int, number: int, are_differentiable: list[bool]) -> list[Tensor]:
        """What is to be sent for ``values``: what stands for them here, detached."""
        sent = Sent(to, number)
        standing: list[Any] = [self._enter(value, sent) for value in values]
        if self.recording:
            if [value.requires_grad for value in standing] != are_differentiable:
                raise RuntimeError(
                    f"border {number}: other tensors need gradients than a run without weights has shown"
                )
            sent.leaves = [value for value in standing if value.requires_grad]
            self.segments += [sent] if sent.leaves else []
        return [value.detach() for value in standing]

    def receive(self, values: list[Tensor], *, source: int, number: int, are_differentiable: list[bool]) -> None:
        """``values`` (just received, nobody else's) become leaves that collect gradients, where they are differentiable
        and this is recorded."""
        if not self.recording:
            return
        for value, is_differentiable in zip(values, are_differentiable, strict=True):
            value.requires_grad_(is_differentiable)
        if leaves := [value for value in values if value.requires_grad]:
            self.segments.append(Received(source, number, leaves))

    def stand_in(self, ghost: Tensor, value: Tensor) -> None:
        """From here on layers that are given ``ghost`` get ``value``."""
        self._leaves[id(ghost)] = Cut(root=ghost, leaf=value)

    def open_experts(self, call: ExpertsCall) -> None:
        if self.recording and self._current is not None:
            self._current.experts = call

    def close_experts(self, call: ExpertsCall, output: Tensor) -> Tensor:
        """Hands the experts' output (T, H) back to the layer."""
        call.output = output.requires_grad_() if self.recording else output
        return call.output

    def backward_loss(self, weight: float) -> None:
        """Backward of what follows the last layer (head, loss, auxiliary loss), scaled by ``weight``."""
        assert self.loss is not None
        (self.loss * weight).backward()
        self.loss = None
