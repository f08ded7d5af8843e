"""What devices compute and exchange for a decoupled model under block parallelism, layer by layer: the arithmetic of
``inference/strategies/block_parallel``, without computing.

What devices hold between layers is one of the states of ``block_layout``; a layer that wants another costs an exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from isthmus.planning.block_layout import (
    ALL,
    COLUMNS,
    FASTEST,
    PARTS,
    SLICES,
    TOKENS,
    WHOLE,
    BlockPart,
    Portion,
    Rectangle,
    layout_of,
)
from isthmus.planning.exchanges import (
    Exchange,
    Traffic,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    token_algorithm,
)
from isthmus.planning.original_ways import layer_codecs, original_plans
from isthmus.planning.portions import begun, in_portions
from isthmus.planning.shares import divide_layer
from isthmus.planning.steps import Step, Work
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare, Range, TransformerSpec

START, END, DECOUPLED = "start", "end", "decoupled"
State = tuple[str, str]
"""After a layer: how it was computed (an original one's way, ``DECOUPLED``; ``START`` before the first, ``END`` after
the last), and the codec of the last original one."""


def block_steps(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> tuple[tuple[Step, ...], bool]:
    """(all layers' steps, whether devices end with their tokens: else all of them with everything)."""
    return _walk(transitions(plan.weights, spec, request, overlaps=plan.overlaps), plan, spec, layer_codecs(plan, spec))


def block_token_steps(
    plan: InferencePlan, spec: TransformerSpec, batch: int, num_keys: int, algorithm: str | None
) -> tuple[Step, ...]:
    """All layers of one more token of each sequence, which sees ``num_keys``. ``algorithm``: how so few values are best
    summed; slices, and teams' sums, are exchanged in FP32."""
    one = InferenceRequest(num_tokens=1, batch=batch)
    found = transitions(plan.weights, spec, one, num_keys, algorithm)
    return _walk(found, plan, spec, ["fp32"] * (spec.num_layers + 1))[0]


def _walk(
    found: Transitions, plan: InferencePlan, spec: TransformerSpec, codecs: Sequence[str]
) -> tuple[tuple[Step, ...], bool]:
    kinds = original_plans(plan, spec)
    layers = [(kinds.get(number, DECOUPLED), codecs[number]) for number in range(spec.num_layers)]
    if plan.overlaps:
        return found.in_turn(codecs[0], layers)
    way = [found.find(*pair) for pair in pairwise([(START, codecs[0]), *layers, (END, codecs[-1])])]
    return tuple(step for each in way for step in each.steps), way[-1].state == TOKENS


@dataclass(frozen=True, kw_only=True)
class Transition:
    """From one layer to the next one, whose first exchange may follow what the layer before computed last."""

    before: tuple[Step, ...]
    """Of the layer before, alone."""
    both: tuple[Step, ...]
    steps: tuple[Step, ...]
    """Of both, what the layer before had not ended, up to what the next one has not."""
    state: str
    """What devices have in the end (``block_layout``)."""


class Transitions:
    """From every layer to every next one, each found once: plans that divide sub-blocks alike share their steps."""

    def __init__(self, nothing: _Steps) -> None:
        self._nothing = nothing
        self._found: dict[tuple[State, State], Transition] = {}

    def find(self, before: State, after: State) -> Transition:
        """From a layer in the state ``before`` to the next one in ``after``."""
        if (before, after) not in self._found:
            steps = self._nothing.begin(WHOLE if before[0] == START else PARTS, before[1])
            if before[0] != START:
                steps.layer(before[0])
            alone = tuple(steps.done)
            if after[0] == END:
                steps.end()
            else:
                steps.layer(*after)
            both = tuple(steps.done)
            stop = len(both) if after[0] == END else len(both) - _num_open(both)
            own = both[len(alone) - _num_open(alone) : stop]
            self._found[before, after] = Transition(before=alone, both=both, steps=own, state=steps.state)
        return self._found[before, after]

    def in_turn(self, codec: str, layers: Sequence[State]) -> tuple[tuple[Step, ...], bool]:
        """As ``block_steps``, of all ``layers``: where exchanges overlap, what a layer has left to compute depends on
        what comes before and after it. ``codec``: of exchanges before the first."""
        steps = self._nothing.begin(WHOLE, codec)
        for layer in layers:
            steps.layer(*layer)
        steps.end()
        return tuple(steps.done), steps.state == TOKENS


@lru_cache(maxsize=16)
def transitions(
    weights: tuple[float, ...],
    spec: TransformerSpec,
    request: InferenceRequest,
    num_keys: int | None = None,
    algorithm: str | None = None,
    *,
    overlaps: bool = False,
) -> Transitions:
    """Of devices with these parts of the work. ``num_keys``: that each token sees, where the request is of one more
    token; those of the request without. ``algorithm``: of all-reduces that are prepared once; without, they are general
    ones in two steps. ``overlaps``: as in ``InferencePlan``."""
    return Transitions(_Steps(weights, spec, request, num_keys, algorithm, overlaps=overlaps))


def _num_open(steps: Sequence[Step]) -> int:
    """1 where what was computed last waits for an exchange that may follow."""
    return int(bool(steps) and steps[-1].exchange is None)


class _Steps:
    """Steps so far, and what devices hold after them."""

    def __init__(
        self,
        weights: tuple[float, ...],
        spec: TransformerSpec,
        request: InferenceRequest,
        num_keys: int | None,
        algorithm: str | None,
        *,
        overlaps: bool,
    ) -> None:
        """See ``transitions``."""
        self._weights, self._spec, self._request = weights, spec, request
        self._num_devices = len(weights)
        self._is_token = num_keys is not None
        self._num_keys = request.num_tokens if num_keys is None else num_keys
        self._algorithm, self._codec = algorithm, "fp32"
        self._all_rows = request.batch * request.num_tokens
        self._layout = layout_of(weights, spec)
        work = [self._sub_block_work(part) for part in self._layout.parts]
        self._decoupled = tuple(work)
        self._halves = (
            tuple(replace(own, block_columns=0.0) for own in work),
            tuple(replace(own, block_heads=0.0, scores=0) for own in work),
        )
        self._portions = [ALL]
        if not self._is_token:
            self._portions = self._layout.portions(
                overlaps=overlaps, num_tokens=request.num_tokens, batch=request.batch
            )
        self._begun_rows: list[int] | None = None
        """By device: what the next layer is begun with while the last exchange goes on."""
        self.state = WHOLE
        self.done: list[Step] = []

    def begin(self, state: str, codec: str) -> _Steps:
        """As many devices that hold ``state``, and have done nothing."""
        steps = copy(self)
        steps.state, steps.done, steps._codec, steps._begun_rows = state, [], codec, None
        return steps

    def layer(self, kind: str, codec: str | None = None) -> None:
        """An original layer, computed so, or a decoupled one. ``codec``: of exchanges from now on."""
        self._codec = codec or self._codec
        if kind != DECOUPLED:
            self._original(kind)
        elif self._layout.has_teams:
            self._in_teams()
        else:
            self._become(SLICES)
            self._compute(self._decoupled)
            self.state = PARTS

    def end(self) -> None:
        """Devices end with their tokens, or all with everything."""
        if self.state != TOKENS:
            self._become(WHOLE)

    def _compute(self, work: tuple[Work, ...]) -> None:
        if self._begun_rows is not None:
            self.done[-1], work = begun(self.done[-1], work, self._begun_rows, self._spec)
            self._begun_rows = None
        self.done.append(Step(work=work, exchange=None))

    def _in_teams(self) -> None:
        """Heads and columns of a sub-block are divided in its team. Sums go to whom the tokens are of, who gives all of
        its team what comes of them; of one more token of each sequence all members have all."""
        for half in self._halves:
            self._become(SLICES)
            self._compute(half)
            self._exchange(self._of_teams(self._team_sums), is_prepared=self._algorithm is not None)
            self.state = SLICES if self._is_token else PARTS

    def _team_sums(self, team: Range) -> list[Exchange]:
        if self._is_token:
            num_values = self._request.batch * len(self._layout.units[team.start])
            algorithm = token_algorithm(num_values, len(team)) or "two_step"
            return all_reduce(self._codec, num_values, len(team), algorithm)
        return [reduce_scatter(self._codec, self._values_of(PARTS)[team.start : team.stop])]

    def _of_teams(self, exchanges_of: Callable[[Range], list[Exchange]]) -> list[Exchange]:
        """Of all teams at once; who is in none has nothing to exchange."""
        found = [(team, exchanges_of(team) if len(team) > 1 else []) for team in self._layout.teams]
        together = []
        for number in range(max(len(own) for _, own in found)):
            parts = [own[number] if number < len(own) else (Traffic(),) * len(team) for team, own in found]
            together.append(tuple(traffic for part in parts for traffic in part))
        return together

    def _original(self, kind: str) -> None:
        whole = self._work(self._all_rows, 1.0)
        if self._num_devices == 1 or kind == "gather":
            self._become(WHOLE)
            self._compute((whole,) * self._num_devices)
        elif kind == "tensor":
            self._tensor()
        elif kind == "tokens":
            self._become(WHOLE)
            # Queries, keys and values come from one product, of all tokens; it is this share of attention's.
            product = self._spec.product_share
            self._compute(
                tuple(
                    replace(
                        self._work(rows, 1.0),
                        attention_rows=round(rows + (self._all_rows - rows) * product),
                    )
                    for rows in self._rows_of(TOKENS)
                )
            )
            self.state = TOKENS
        elif kind == "sequence":
            self._sequence()
        else:
            self._fastest(whole)

    def _become(self, wanted: str) -> None:
        """The exchange, if any, from what is there to what is wanted."""
        if self._num_devices > 1 and self.state not in (wanted, WHOLE):
            if (self.state, wanted) == (PARTS, SLICES):
                values = self._values_of(PARTS)
                self._exchange(self._of_teams(lambda team: all_gather(self._codec, values[team.start : team.stop])))
            elif self._portions == [ALL]:
                self._exchange([self._of_all(wanted, ALL)])
            else:
                self._exchange_in_portions(wanted)
        self.state = wanted

    def _of_all(self, wanted: str, portion: Portion) -> Exchange:
        if wanted == WHOLE:
            # What all of a team have, each of them gives some columns of.
            values = self._values_of(COLUMNS if self.state == SLICES else self.state, portion)
            return all_gather(self._codec, values)[0]
        areas = self._layout.areas(self.state, wanted, self._request.num_tokens, portion)
        return all_to_all(self._codec, [[self._request.batch * area for area in row] for row in areas])

    def _exchange_in_portions(self, wanted: str) -> None:
        if not self.done:
            self._compute((Work(),) * self._num_devices)
        first, second = self._portions
        self.done[-1:] = in_portions(
            self.done[-1],
            (self._of_all(wanted, first), self._of_all(wanted, second)),
            (self._rows_of(self.state, first), self._rows_of(self.state, second)),
        )
        self._begun_rows = self._rows_of(wanted, first)

    def _rectangles(self, state: str, portion: Portion = ALL) -> list[Rectangle]:
        return self._layout.rectangles(state, self._request.num_tokens, portion)

    def _values_of(self, state: str, portion: Portion = ALL) -> list[int]:
        return [self._request.batch * own.area for own in self._rectangles(state, portion)]

    def _rows_of(self, state: str, portion: Portion = ALL) -> list[int]:
        return [self._request.batch * len(own.tokens) for own in self._rectangles(state, portion)]

    def _tensor(self) -> None:
        self._become(WHOLE)
        spec, rows = self._spec, self._all_rows
        shares = divide_layer(spec, self._weights)
        algorithm = self._algorithm or "two_step"
        reduced = all_reduce(self._codec, rows * spec.hidden_size, self._num_devices, algorithm)
        self._compute(
            tuple(
                Work(
                    attention_rows=rows,
                    attention_share=_num_products(spec, share) / (spec.num_heads + spec.num_kv_heads),
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
        self._become(TOKENS)
        spec, own_rows = self._spec, self._rows_of(TOKENS)
        kv_values = 2 * spec.num_kv_heads * spec.head_size
        self._compute(
            tuple(replace(self._work(rows, 1.0), copied=kv_values * (rows + self._all_rows)) for rows in own_rows)
        )
        self._exchange(all_gather(self._codec, [kv_values * rows for rows in own_rows]))

    def _fastest(self, whole: Work) -> None:
        self._become(FASTEST)
        fastest = self._layout.fastest
        self._compute(tuple(whole if place == fastest else Work() for place in range(self._num_devices)))
        self._become(PARTS)

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

    def _sub_block_work(self, part: BlockPart) -> Work:
        spec, held = self._spec, part.held(self._spec)
        [(block, share), *_] = held
        products = len(block.heads) + len(block.heads) // spec.heads_per_kv_head
        return Work(
            block_rows=self._all_rows,
            block_share=sum(len(block.units) for block, _ in held) / spec.hidden_size,
            block_heads=_num_products(spec, share) / products,
            block_columns=len(share.columns) / spec.intermediate_size,
            scores=self._all_rows * self._num_keys * sum(len(share.heads) for _, share in held),
        )


def _num_products(spec: TransformerSpec, share: LayerShare) -> int:
    """Heads that attention's matrices are of: for queries and outputs, for keys and values."""
    return len(share.heads) + len(share.kv_heads(spec))
