"""What devices compute and exchange for a decoupled model under block parallelism, layer by layer: the arithmetic of
``inference/strategies/block_parallel``, without computing.

What devices hold between layers is their ``slices`` of all tokens, the ``whole`` of all tokens, or their ``tokens``; a
layer that wants another of them costs an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.exchanges import Exchange, all_gather, all_reduce, all_to_all
from isthmus.planning.shares import divide, divide_layer
from isthmus.planning.steps import Step, Work
from isthmus.planning.wire_errors import is_within, squared_error
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare, Range, SubBlock, TransformerSpec

_START, _END, _DECOUPLED = "start", "end", "decoupled"
_State = tuple[str, str]
"""After a layer: how it was computed, and the codec of the last original one."""


def sub_blocks_of(plan: InferencePlan, spec: TransformerSpec) -> list[Range]:
    """Which sub-blocks of every decoupled layer each device of ``plan`` has; none of a model that has none. In
    proportion to the plan's weights, at least one each. Raises ``IsthmusError`` for more devices than sub-blocks."""
    num_devices = len(plan.devices)
    if spec.decoupling is None:
        return [Range(start=0, stop=0)] * num_devices
    num = spec.decoupling.num_sub_blocks
    if num < num_devices:
        raise IsthmusError(f"devices: got {num_devices} for a model of {num} sub-blocks, wanted at most {num}")
    one_each = divide(num - num_devices, plan.weights) if num > num_devices else [Range(start=0, stop=0)] * num_devices
    stops = [sum(len(part) + 1 for part in one_each[: device + 1]) for device in range(num_devices)]
    return [Range(start=start, stop=stop) for start, stop in zip([0, *stops], stops, strict=False)]


def original_plans(plan: InferencePlan, spec: TransformerSpec) -> dict[int, str]:
    """How each original layer of a decoupled model is computed, by its number. Raises ``IsthmusError`` for another
    number of them than the model has."""
    if spec.decoupling is None:
        return {}
    layers = spec.decoupling.original_layers
    chosen = plan.originals or ("gather",) * len(layers)
    if len(chosen) != len(layers):
        raise IsthmusError(f"originals: got {len(chosen)} plans for {len(layers)} original layers, wanted one for each")
    return dict(zip(layers, chosen, strict=True))


def layer_codecs(plan: InferencePlan, spec: TransformerSpec) -> list[str]:
    """What exchanges before and in each layer, and after the last one, are in: an original layer's up to the next one.
    Raises ``IsthmusError`` as ``original_plans``."""
    layers = () if spec.decoupling is None else spec.decoupling.original_layers
    codecs = plan.codecs or (plan.codec,) * len(layers)
    if len(codecs) != len(layers):
        raise IsthmusError(f"codecs: got {len(codecs)} for {len(layers)} original layers, wanted one for each")
    own = dict(zip(layers, codecs, strict=True))
    found = [codecs[0] if codecs else plan.codec]
    for number in range(spec.num_layers):
        found[number:] = [own.get(number, found[number])] * 2
    return found


def fastest(plan: InferencePlan) -> int:
    """Which device, by its place in the plan, computes what one computes for all."""
    return plan.weights.index(max(plan.weights))


def original_shares(plan: InferencePlan, spec: TransformerSpec) -> list[dict[int, LayerShare | None]]:
    """By device: of which original layers it has another share than the whole; None is no part."""
    num_devices = len(plan.devices)
    shares: list[dict[int, LayerShare | None]] = [{} for _ in range(num_devices)]
    if num_devices == 1:
        return shares
    for number, kind in original_plans(plan, spec).items():
        for device in range(num_devices):
            if kind == "tensor":
                shares[device][number] = divide_layer(spec, plan.weights)[device]
            elif kind == "fastest" and device != fastest(plan):
                shares[device][number] = None
    return shares


def block_steps(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> tuple[tuple[Step, ...], bool]:
    """(all layers' steps, whether devices end with their tokens: else all of them with everything)."""
    steps, kinds, codecs = _Steps(plan, spec, request), original_plans(plan, spec), layer_codecs(plan, spec)
    for number in range(spec.num_layers):
        steps.layer(kinds.get(number), codecs[number])
    steps.end()
    return tuple(steps.done), steps.state == "tokens"


def block_token_steps(
    plan: InferencePlan, spec: TransformerSpec, batch: int, num_keys: int, algorithm: str | None
) -> tuple[Step, ...]:
    """All layers of one more token of each sequence, which sees ``num_keys``. ``algorithm``: how so few values are best
    summed; slices are exchanged in FP32."""
    one = InferenceRequest(num_tokens=1, batch=batch)
    steps = _Steps(plan, spec, one, num_keys=num_keys, algorithm=algorithm, codec="fp32")
    kinds = original_plans(plan, spec)
    for number in range(spec.num_layers):
        steps.layer(kinds.get(number))
    steps.end()
    return tuple(steps.done)


@dataclass(frozen=True)
class _Path:
    """One way to come to the end of some layer."""

    seconds: float
    squared: float
    """Of its error (``wire_errors``)."""
    chosen: tuple[_State, ...] = ()
    """For each original layer so far."""


class OriginalChoice:
    """How each original layer of a decoupled model is best computed, and in which codec its exchanges are, all else
    being as in ``plan``: exact where seconds of steps depend on no more than the layer before.

    The best ways to end a layer in each state follow from those to end the one before. Under a limit of errors a state
    has several: each faster than all that are as exact.
    """

    def __init__(
        self,
        plan: InferencePlan,
        spec: TransformerSpec,
        request: InferenceRequest,
        seconds_of: Callable[[Sequence[Step]], float],
    ) -> None:
        self._plan, self._spec, self._request, self._seconds_of = plan, spec, request, seconds_of
        self._costs: dict[tuple[_State, _State], tuple[float, float]] = {}

    def best(self, kinds: Sequence[str], codecs: Sequence[str], max_error: float = math.inf) -> InferencePlan | None:
        """The fastest with one of ``kinds`` and one of ``codecs`` for each original layer whose expected error is at
        most ``max_error``; None where there is none."""
        spec, plan = self._spec, replace(self._plan, codec=codecs[0])
        choices = [(kind, codec) for kind in kinds for codec in codecs]
        paths: dict[_State, list[_Path]] = {(_START, codecs[0]): [_Path(0.0, 0.0)]}
        for number in range(spec.num_layers):
            after: dict[_State, list[_Path]] = {}
            for before, so_far in paths.items():
                for state in [(_DECOUPLED, before[1])] if spec.is_decoupled(number) else choices:
                    after.setdefault(state, []).extend(self._longer(so_far, before, state))
            paths = {state: _best_paths(found, max_error) for state, found in after.items()}
        ends = [path for before, so_far in paths.items() for path in self._longer(so_far, before, (_END, before[1]))]
        found = _best_paths(ends, max_error)
        if not found:
            return None
        chosen = found[0].chosen
        return replace(plan, originals=tuple(kind for kind, _ in chosen), codecs=tuple(codec for _, codec in chosen))

    def _longer(self, paths: Sequence[_Path], before: _State, state: _State) -> Iterator[_Path]:
        """``paths``, which ended in ``before``, and one layer more."""
        more_s, more = self._cost(before, state)
        for path in paths:
            chosen = path.chosen if state[0] in (_DECOUPLED, _END) else (*path.chosen, state)
            yield _Path(path.seconds + more_s, path.squared + more, chosen)

    def _cost(self, before: _State, state: _State) -> tuple[float, float]:
        """Seconds and squared error of a layer after another one; an exchange may follow what the other computed."""
        if (before, state) not in self._costs:
            is_first = before[0] == _START
            steps = _Steps(self._plan, self._spec, self._request, "whole" if is_first else "slices", codec=before[1])
            if not is_first:
                steps.layer(None if before[0] == _DECOUPLED else before[0])
            before_s, so_far = self._seconds_of(steps.done), squared_error(steps.done)
            if state[0] == _END:
                steps.end()
            else:
                steps.layer(None if state[0] == _DECOUPLED else state[0], state[1])
            self._costs[before, state] = self._seconds_of(steps.done) - before_s, squared_error(steps.done) - so_far
        return self._costs[before, state]


def _best_paths(paths: Sequence[_Path], max_error: float) -> list[_Path]:
    """Those within ``max_error`` to which no other is both as fast and as exact, fastest first; one, if errors are not
    limited."""
    best: list[_Path] = []
    for path in sorted(paths, key=lambda path: (path.seconds, path.squared, path.chosen)):
        if is_within(path.squared, max_error) and not (best and is_within(best[-1].squared, math.sqrt(path.squared))):
            best.append(path)
    return best[:1] if math.isinf(max_error) else best


@dataclass(frozen=True)
class _Sizes:
    """By device."""

    widths: list[int]
    """Hidden units of its slices."""
    rows: list[int]
    """Tokens of its range, of all sequences."""


class _Steps:
    """Steps so far, and what devices hold after them."""

    def __init__(
        self,
        plan: InferencePlan,
        spec: TransformerSpec,
        request: InferenceRequest,
        state: str = "whole",
        *,
        num_keys: int | None = None,
        algorithm: str | None = None,
        codec: str | None = None,
    ) -> None:
        """``num_keys``: that each token sees, those of the request without. ``algorithm``: of all-reduces that are
        prepared once; without, they are general ones in two steps."""
        self._plan, self._spec = plan, spec
        self._num_devices = len(plan.devices)
        self._num_keys = request.num_tokens if num_keys is None else num_keys
        self._algorithm, self._codec = algorithm, codec or plan.codec
        self._all_rows = request.batch * request.num_tokens
        owned = sub_blocks_of(plan, spec)
        blocks = [[spec.sub_block(number) for number in range(part.start, part.stop)] for part in owned]
        ranges = divide(request.num_tokens, plan.weights)
        self._sizes = _Sizes(
            widths=[sum(len(block.units) for block in own) for own in blocks],
            rows=[request.batch * len(part) for part in ranges],
        )
        self._decoupled = tuple(self._sub_block_work(own) for own in blocks)
        self.state = state
        self.done: list[Step] = []

    def layer(self, kind: str | None, codec: str | None = None) -> None:
        """An original layer, computed so, or with None a decoupled one. ``codec``: of exchanges from now on."""
        self._codec = codec or self._codec
        if kind is None:
            self._become("slices")
            self._compute(self._decoupled)
        else:
            self._original(kind)

    def end(self) -> None:
        """Devices end with their tokens, or all with everything."""
        if self.state != "tokens":
            self._become("whole")

    def _compute(self, work: tuple[Work, ...]) -> None:
        self.done.append(Step(work=work, exchange=None))

    def _original(self, kind: str) -> None:
        whole = self._work(self._all_rows, 1.0)
        if self._num_devices == 1 or kind == "gather":
            self._become("whole")
            self._compute((whole,) * self._num_devices)
        elif kind == "tensor":
            self._tensor()
        elif kind == "tokens":
            self._become("whole")
            # Queries, keys and values come from one product, of all tokens; it is this share of attention's.
            spec = self._spec
            product = (spec.num_heads / 2 + spec.num_kv_heads) / (spec.num_heads + spec.num_kv_heads)
            self._compute(
                tuple(
                    replace(
                        self._work(rows, 1.0),
                        attention_rows=round(rows + (self._all_rows - rows) * product),
                    )
                    for rows in self._sizes.rows
                )
            )
            self.state = "tokens"
        elif kind == "sequence":
            self._sequence()
        else:
            self._fastest(whole)

    def _become(self, wanted: str) -> None:
        """The exchange, if any, from what is there to what is wanted."""
        if wanted == self.state or self._num_devices == 1:
            self.state = wanted
            return
        sizes, codec = self._sizes, self._codec
        if wanted == "whole":
            hidden = self._spec.hidden_size
            by_slices = [self._all_rows * width for width in sizes.widths]
            values = by_slices if self.state == "slices" else [rows * hidden for rows in sizes.rows]
            self._exchange(all_gather(codec, values))
        elif self.state != "whole":
            # Device i has slice i of all tokens and gives j its tokens of it, or the other way round.
            sent = [[rows * width for rows in sizes.rows] for width in sizes.widths]
            if wanted == "slices":
                sent = [list(column) for column in zip(*sent, strict=True)]
            self._exchange([all_to_all(codec, sent)])
        self.state = wanted

    def _tensor(self) -> None:
        self._become("whole")
        spec, rows = self._spec, self._all_rows
        shares = divide_layer(spec, self._plan.weights)
        algorithm = self._algorithm or "two_step"
        reduced = all_reduce(self._codec, rows * spec.hidden_size, self._num_devices, algorithm)
        kv = spec.num_heads + spec.num_kv_heads
        self._compute(
            tuple(
                Work(
                    attention_rows=rows,
                    attention_share=(len(share.heads) + len(share.kv_heads(spec))) / kv,
                    scores=rows * self._num_keys * len(share.heads),
                )
                for share in shares
            )
        )
        self._exchange(reduced, is_prepared=self._algorithm is not None)
        self._compute(
            tuple(Work(mlp_rows=rows, mlp_share=len(share.columns) / spec.intermediate_size) for share in shares)
        )
        self._exchange(reduced, is_prepared=self._algorithm is not None)

    def _sequence(self) -> None:
        self._become("tokens")
        spec = self._spec
        kv_values = 2 * spec.num_kv_heads * spec.head_size
        self._compute(
            tuple(
                replace(self._work(rows, 1.0), copied=kv_values * (rows + self._all_rows)) for rows in self._sizes.rows
            )
        )
        self._exchange(all_gather(self._codec, [kv_values * rows for rows in self._sizes.rows]))

    def _fastest(self, whole: Work) -> None:
        self._become("slices")
        device, codec = fastest(self._plan), self._codec
        values = [self._all_rows * width for width in self._sizes.widths]
        there = [[count if to == device else 0 for to in range(len(values))] for count in values]
        back = [[count if source == device else 0 for count in values] for source in range(len(values))]
        self._exchange([all_to_all(codec, there)])
        self._compute(tuple(whole if place == device else Work() for place in range(self._num_devices)))
        self._exchange([all_to_all(codec, back)])

    def _exchange(self, exchanges: Sequence[Exchange], *, is_prepared: bool = False) -> None:
        """The first one follows what was computed last."""
        for exchange in exchanges:
            if not self.done or self.done[-1].exchange is not None:
                self._compute((Work(),) * self._num_devices)
            self.done[-1] = replace(self.done[-1], exchange=exchange, is_prepared=is_prepared)

    def _work(self, rows: int, share: float) -> Work:
        """A layer of ``rows`` tokens."""
        scores = rows * self._num_keys * self._spec.num_heads
        return Work(attention_rows=rows, attention_share=share, scores=scores, mlp_rows=rows, mlp_share=share)

    def _sub_block_work(self, own: Sequence[SubBlock]) -> Work:
        return Work(
            block_rows=self._all_rows,
            block_share=sum(len(block.units) for block in own) / self._spec.hidden_size,
            scores=self._all_rows * self._num_keys * sum(len(block.heads) for block in own),
        )
