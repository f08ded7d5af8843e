"""The first weights of a decoupled model: slices of the checkpoint's, fitted to what the original computes.

A sub-block sees a slice where the original layer saw all hidden units. ``plain`` gives it the original's weights for
its slice, as if the other units were zero. ``fitted`` walks through some text layer by layer:
1. What a matrix reads is guessed from the slice: A = argmin Σ |z - A s|², z the original's input, s the sub-block's;
   the sub-block's matrix is W·A, as if it rebuilt the other units from its own.
2. What attention and MLP write is regressed on what the sub-block has inside, towards the original's residual sum there
   less the sub-block's own residual. So an error made before is mended as far as it can be seen.
3. Norms that come last (post-norm) get the factor and offset of each unit that fit best.
Each step sees what the sub-blocks fitted so far produce, so errors do not pile up unseen.

Shapes: N sub-blocks, n of them of one width w side by side, M tokens, H hidden units, I inner units (heads or MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isthmus.decoupling.regression import Regression, Scaling
from isthmus.decoupling.roles import HalfLayer, halves_of
from isthmus.decoupling.walking import Call, Spy, calls_of
from isthmus.models.decoupled.architectures import layers_of
from isthmus.models.decoupled.sub_blocks import Parts, Slices

INITIALISATIONS = ("fitted", "plain")
RIDGE_READ = 1e-4
RIDGE_WRITE = 1e-2
ROWS_PER_INPUT = 4
"""Fewer tokens than this many times a matrix's inputs do not determine it: it stays as it is."""

Progress = Callable[[float], None]


@torch.no_grad()
def copy_weights(original: PreTrainedModel, decoupled: PreTrainedModel) -> None:
    """``plain``: every weight as it is; of sub-blocks that have heads of their own, those of its units and heads."""
    weights = original.state_dict()
    for name, target in decoupled.state_dict().items():
        if target.shape == weights[name].shape:
            target.copy_(weights[name])
    pairs: list[tuple[Any, Any]] = list(zip(layers_of(original), layers_of(decoupled), strict=True))
    for theirs, ours in pairs:
        if is_decoupled_layer(ours):
            for place in range(2):
                _copy_half(halves_of(theirs)[place], halves_of(ours)[place], ours.slices)


def is_decoupled_layer(layer: Any) -> bool:
    return isinstance(getattr(layer, "slices", None), Slices)


def _copy_half(theirs: HalfLayer, ours: HalfLayer, slices: Slices) -> None:
    for target, source in zip(ours.reading, theirs.reading, strict=True):
        if target.shape != source.shape:
            width = slices.widths[0]
            guesses = torch.eye(source.shape[1]).unflatten(1, (slices.num, width)).transpose(0, 1)
            _read_through(guesses, 0, target, source)
    if ours.writing.shape != theirs.writing.shape:
        blocks = zip(ours.writing.chunk(slices.num), theirs.writing.chunk(slices.num), strict=True)
        for number, (target, source) in enumerate(blocks):
            target.copy_(source.chunk(slices.num, dim=1)[number])


@torch.no_grad()
def fit_weights(
    original: PreTrainedModel,
    decoupled: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    progress: Progress | None = None,
) -> None:
    """``fitted``: changes the weights of ``decoupled``'s decoupled layers, which ``copy_weights`` has filled.

    Both models are in eval mode and FP32. ``batches`` are ``input_ids`` and ``attention_mask`` (B, T); some 20,000
    tokens are enough for 384 hidden units. Blocks: a few times as long as the models take to read the batches.
    """
    theirs, ours = calls_of(original, batches), calls_of(decoupled, batches)
    layers: list[tuple[nn.Module, Any]] = list(zip(layers_of(original), layers_of(decoupled), strict=True))
    for number, (their_layer, our_layer) in enumerate(layers):
        if is_decoupled_layer(our_layer):
            for place in range(2):
                _fit_half(_Walk(their_layer, our_layer, place, theirs, ours))
        for their_call, our_call in zip(theirs, ours, strict=True):
            their_call.hidden, our_call.hidden = their_call.run(their_layer), our_call.run(our_layer)
        if progress is not None:
            progress((number + 1) / len(layers))


class _Recording(Slices):
    """Slices that remember what went through them: of attention first, then of the MLP."""

    reads: list[Parts]
    inner: list[Tensor]
    norms: list[Parts]

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(widths)
        self.__dict__.update(reads=[], inner=[], norms=[])  # the class is frozen

    def read(self, parts: Parts, weight_OH: Tensor, bias_O: Tensor | None) -> Tensor:
        if len(self.reads) == len(self.inner):
            self.reads.append(parts)
        return super().read(parts, weight_OH, bias_O)

    def write(self, inner_NMO: Tensor, weight_HO: Tensor, bias_H: Tensor | None) -> Parts:
        self.inner.append(inner_NMO)
        return super().write(inner_NMO, weight_HO, bias_H)

    def norm(self, parts: Parts, norm: nn.Module) -> Parts:
        self.norms.append(parts)
        return super().norm(parts, norm)


@dataclass
class _Sight:
    """One batch inside half a layer; rows are tokens that are no padding. ``their_…`` is the original's, (M, H);
    what is the sub-blocks' is a list by runs of one width, (n, M, w)."""

    inputs: Parts
    """What the sub-blocks' readers read."""
    inner: Tensor
    """What their writers read, (N, M, I)."""
    residual: Parts
    """What their writers' output is added to."""
    their_inputs: Tensor
    their_sum: Tensor
    """The residual sum after the writer."""


class _Walk:
    """Half a layer (``place`` 0: attention, 1: MLP) of both models, and the batches that go through it."""

    def __init__(
        self, their_layer: nn.Module, our_layer: Any, place: int, theirs: list[Call], ours: list[Call]
    ) -> None:
        self.slices: Slices = our_layer.slices
        self.theirs, self.ours = halves_of(their_layer)[place], halves_of(our_layer)[place]
        self._their_layer, self._our_layer, self._place = their_layer, our_layer, place

        self._theirs = [self._see_theirs(call) for call in theirs]
        self._ours_calls = ours

    def _see_theirs(self, call: Call) -> tuple[Tensor, Tensor]:
        """(what the original's readers read, the residual sum after its writer), (M, H) each."""
        # The sum is what the next norm reads, or, where norms come first, what the layer ends with.
        sum_at = halves_of(self._their_layer)[1].norm if self.ours.norm_first else self.theirs.norm
        with Spy(reader=self.theirs.readers[0], sum=sum_at) as spy:
            output = call.run(self._their_layer)
        is_end = self.ours.norm_first and self._place == 1
        return call.rows(spy.inputs["reader"]), call.rows(output if is_end else spy.inputs["sum"])

    def sights(self) -> Iterator[_Sight]:
        """What is to be seen now, batch after batch."""
        place = self._place
        for (their_inputs, their_sum), call in zip(self._theirs, self._ours_calls, strict=True):
            recording = _Recording(self.slices.widths)
            self._our_layer.slices = recording
            try:
                call.run(self._our_layer)
            finally:
                self._our_layer.slices = self.slices
            residual = recording.norms[place] if self.ours.norm_first else recording.reads[place]
            chosen = call.is_token.flatten()
            yield _Sight(
                [part[:, chosen] for part in recording.reads[place]],
                recording.inner[place][:, chosen],
                [part[:, chosen] for part in residual],
                their_inputs,
                their_sum,
            )


def _fit_half(walk: _Walk) -> None:
    readers = [Regression(has_constant=False) for _ in walk.slices.runs]
    for sight in walk.sights():
        for fit, part in zip(readers, sight.inputs, strict=True):
            fit.add(part, sight.their_inputs.expand(len(part), -1, -1))
    for fit, (start, _, _) in zip(readers, walk.slices.runs, strict=True):
        guesses, _ = fit.solve(None, RIDGE_READ)
        for target, source in zip(walk.ours.reading, walk.theirs.reading, strict=True):
            _read_through(guesses, start, target, source)
    sights = list(walk.sights())
    if readers[0].num_rows >= ROWS_PER_INPUT * walk.ours.writing.shape[1]:
        _fit_writer(walk, sights)
    if not walk.ours.norm_first:
        _fit_norm(walk, sights)


def _read_through(guesses_nHw: Tensor, start: int, target: Tensor, source: Tensor) -> None:
    """Sub-blocks from hidden unit ``start`` on read with ``source`` (O, H) what they guess from their slice."""
    num, _, width = guesses_nHw.shape
    if target.shape == source.shape:
        for number, guess_Hw in enumerate(guesses_nHw):
            first = start + number * width
            target[:, first : first + width] = source @ guess_Hw
    else:  # heads of their own
        for rows, of_source, guess_Hw in zip(target.chunk(num), source.chunk(num), guesses_nHw, strict=True):
            rows.copy_(of_source @ guess_Hw)


def _fit_writer(walk: _Walk, sights: list[_Sight]) -> None:
    slices, matrix, bias = walk.slices, walk.ours.writing, walk.ours.writer.bias
    fits = [Regression(has_constant=bias is not None) for _ in slices.runs]
    for sight in sights:
        first = 0
        for fit, residual, wanted in zip(fits, sight.residual, slices.split(sight.their_sum), strict=True):
            fit.add(sight.inner[first : first + len(residual)], wanted - residual)
            first += len(residual)
    for fit, (start, num, width) in zip(fits, slices.runs, strict=True):
        rows = slice(start, start + num * width)
        solution, constants = fit.solve(matrix[rows].unflatten(0, (num, width)), RIDGE_WRITE)
        matrix[rows] = solution.flatten(0, 1)
        if constants is not None:
            bias[rows] = constants.flatten()  # type: ignore[index]


def _fit_norm(walk: _Walk, sights: list[_Sight]) -> None:
    slices, norm, writer = walk.slices, walk.ours.norm, walk.ours.writer
    scaling = Scaling()
    for sight in sights:
        written = slices.write(sight.inner, walk.ours.writing, writer.bias)  # type: ignore[arg-type]
        sums = [residual + part for residual, part in zip(sight.residual, written, strict=True)]
        scaling.add(slices.join(slices.norm(sums, norm), sight.their_sum.shape), walk.theirs.norm(sight.their_sum))
    factors, offsets = scaling.solve(has_offset=True)
    norm.weight.mul_(factors)
    norm.bias.mul_(factors).add_(offsets)
