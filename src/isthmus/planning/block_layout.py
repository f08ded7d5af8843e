"""Which sub-blocks the devices of a plan have of a decoupled model, and which hidden states lie where between layers.

Up to as many devices as there are sub-blocks have one or more of them each. More devices form as many teams of
neighbours as there are sub-blocks: a team has one, of which every member has some heads and columns, and between layers
some of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

from isthmus.planning.shares import divide, divide_sub_block
from isthmus.spec.inference import InferencePlan
from isthmus.spec.transformer import LayerShare, Range, SubBlock, TransformerSpec

WHOLE, TOKENS, FASTEST = "whole", "tokens", "fastest"
PARTS, SLICES, COLUMNS = "parts", "slices", "columns"
"""What a device has of hidden states (``BlockLayout.rectangles``): everything; all units of its tokens; everything on
the fastest device and nothing on others; its tokens of its team's slices; all tokens of these; or some units of them.
Without teams the last three are the same."""
_NOTHING = Range(start=0, stop=0)
Portion = tuple[int, int]
"""(number, of how many): some of a request's tokens, of every device's own as near as may be to as large a part."""
ALL: Portion = (0, 1)
LEAST_DIVIDED_TOKENS = 32
"""Of all sequences. Fewer are computed and exchanged at once, whatever the plan says: products of half as many rows are
hardly shorter."""


@dataclass(frozen=True, kw_only=True)
class BlockPart:
    """What a device has of every decoupled layer. ``team``: places in the plan of the devices that share it."""

    sub_blocks: Range
    team: Range
    share: LayerShare | None = None
    """Of a sub-block that others of the team have the rest of; None is all of each."""

    @staticmethod
    def alone(sub_blocks: Range) -> BlockPart:
        return BlockPart(sub_blocks=sub_blocks, team=Range(start=0, stop=1))

    def held(self, spec: TransformerSpec) -> list[tuple[SubBlock, LayerShare]]:
        """Sub-blocks, and what it has of each."""
        blocks = [spec.sub_block(number) for number in range(self.sub_blocks.start, self.sub_blocks.stop)]
        whole = LayerShare.whole(spec)
        return [
            (
                block,
                self.share or LayerShare(heads=block.heads, columns=whole.columns, vocabulary=whole.vocabulary),
            )
            for block in blocks
        ]


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Hidden ``units`` of ``tokens``, in all sequences alike."""

    tokens: Range
    units: Range

    @property
    def area(self) -> int:
        return len(self.tokens) * len(self.units)

    def common(self, other: Rectangle) -> Rectangle:
        """What both have; empty where that is nothing."""
        return Rectangle(tokens=self.tokens.common(other.tokens), units=self.units.common(other.units))


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """``parts`` and ``units`` (of its sub-blocks) by device, in the plan's order."""

    weights: tuple[float, ...]
    parts: tuple[BlockPart, ...]
    units: tuple[Range, ...]
    _rectangles: dict[tuple[str, int, Portion], list[Rectangle]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _areas: dict[tuple[str, str, int, Portion], list[list[int]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """What was asked for before."""

    @staticmethod
    def of(plan: InferencePlan, spec: TransformerSpec) -> BlockLayout:
        """Of a decoupled model."""
        return layout_of(plan.weights, spec)

    @property
    def teams(self) -> list[Range]:
        return list(dict.fromkeys(part.team for part in self.parts))

    @property
    def has_teams(self) -> bool:
        """Whether some devices share a sub-block."""
        return len(self.teams) < len(self.parts)

    @property
    def fastest(self) -> int:
        """Which device computes what one computes for all."""
        return self.weights.index(max(self.weights))

    def portions(self, *, overlaps: bool, num_tokens: int, batch: int) -> list[Portion]:
        """What of a request's tokens is computed and exchanged at once: with ``overlaps`` one half after the other,
        unless devices share sub-blocks, whose layers are full of exchanges that need all tokens."""
        is_divided = overlaps and batch * num_tokens >= LEAST_DIVIDED_TOKENS and not self.has_teams
        return [(0, 2), (1, 2)] if is_divided and len(self.parts) > 1 else [ALL]

    def token_ranges(self, num_tokens: int, portion: Portion = ALL) -> list[Range]:
        """By device: its own tokens where tokens are divided, or those of them that are of ``portion``."""
        number, num_portions = portion
        whole = divide(num_tokens, self.weights)
        return [_shifted(divide(len(own), (1.0,) * num_portions)[number], own.start) for own in whole]

    def rectangles(self, state: str, num_tokens: int, portion: Portion = ALL) -> list[Rectangle]:
        """What each device has in one of the states above of ``portion`` of ``num_tokens``, counted anew from 0."""
        key = state, num_tokens, portion
        if key not in self._rectangles:
            lengths = [len(own) for own in self.token_ranges(num_tokens, portion)]
            stops = list(accumulate(lengths))
            own = [Range(start=stop - length, stop=stop) for length, stop in zip(lengths, stops, strict=True)]
            self._rectangles[key] = self._find_rectangles(state, own)
        return self._rectangles[key]

    def areas(self, has: str, wants: str, num_tokens: int, portion: Portion = ALL) -> list[list[int]]:
        """Values of a sequence that device i ``has`` and device j ``wants``: ``[i][j]``."""
        key = has, wants, num_tokens, portion
        if key not in self._areas:
            others = self.rectangles(wants, num_tokens, portion)
            self._areas[key] = [
                [own.common(other).area for other in others] for own in self.rectangles(has, num_tokens, portion)
            ]
        return self._areas[key]

    def _find_rectangles(self, state: str, own_tokens: list[Range]) -> list[Rectangle]:
        num_tokens = own_tokens[-1].stop
        whole, hidden = Range(start=0, stop=num_tokens), Range(start=0, stop=self.units[-1].stop)
        if state == WHOLE:
            return [Rectangle(tokens=whole, units=hidden)] * len(self.units)
        if state == FASTEST:
            found = [Rectangle(tokens=_NOTHING, units=_NOTHING)] * len(self.units)
            found[self.fastest] = Rectangle(tokens=whole, units=hidden)
            return found
        if state == TOKENS:
            return [Rectangle(tokens=part, units=hidden) for part in own_tokens]
        if state == SLICES:
            return [Rectangle(tokens=whole, units=units) for units in self.units]
        found = []
        for team in self.teams:
            units = self.units[team.start]
            if state == PARTS:
                tokens = divide(num_tokens, _of_team(self.weights, team))
                found += [Rectangle(tokens=part, units=self.units[team.start]) for part in tokens]
            else:
                columns = divide(len(units), [1.0] * len(team))
                found += [Rectangle(tokens=whole, units=_shifted(part, units.start)) for part in columns]
        return found


def block_parts(plan: InferencePlan, spec: TransformerSpec) -> tuple[BlockPart, ...]:
    """By device of ``plan``, in its order; no sub-blocks of a model that has none."""
    if spec.decoupling is None:
        places = range(len(plan.devices))
        return tuple(BlockPart(sub_blocks=_NOTHING, team=Range(start=place, stop=place + 1)) for place in places)
    return BlockLayout.of(plan, spec).parts


def team_of(plan: InferencePlan, spec: TransformerSpec, rank: int) -> tuple[int, ...]:
    """Ranks of the devices that share sub-blocks with ``rank``, itself among them; none where it has no part."""
    if rank not in plan.devices:
        return ()
    team = block_parts(plan, spec)[plan.devices.index(rank)].team
    return plan.devices[team.start : team.stop]


@lru_cache(maxsize=4096)
def layout_of(weights: tuple[float, ...], spec: TransformerSpec) -> BlockLayout:
    """Of devices with these parts of the work."""
    assert spec.decoupling is not None
    widths, num_devices = spec.decoupling.widths, len(weights)
    parts: list[BlockPart] = []
    if num_devices <= len(widths):
        for place, own in enumerate(_dealt(len(widths), weights)):
            parts.append(BlockPart(sub_blocks=own, team=Range(start=place, stop=place + 1)))
    else:
        for number, team in enumerate(_teams(weights, widths)):
            own = Range(start=number, stop=number + 1)
            shares: Sequence[LayerShare | None] = [None]
            if len(team) > 1:
                shares = divide_sub_block(spec, spec.sub_block(number), _of_team(weights, team))
            parts += [BlockPart(sub_blocks=own, team=team, share=share) for share in shares]
    starts = [0, *accumulate(widths)]
    units = tuple(Range(start=starts[part.sub_blocks.start], stop=starts[part.sub_blocks.stop]) for part in parts)
    return BlockLayout(weights=weights, parts=tuple(parts), units=units)


def _dealt(num: int, weights: Sequence[float]) -> list[Range]:
    """``num`` sub-blocks in proportion to ``weights``, at least one each."""
    num_devices = len(weights)
    more = [len(part) for part in divide(num - num_devices, weights)] if num > num_devices else [0] * num_devices
    stops = list(accumulate(count + 1 for count in more))
    return [Range(start=start, stop=stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _teams(weights: Sequence[float], widths: Sequence[int]) -> list[Range]:
    """Neighbours, one device or more, for each of ``widths``: such that the team that takes longest ends as soon as it
    can, then the one that takes longest of the others, and so on. Exact: whatever teams follow, it is best to have the
    best teams before."""
    num_devices, num_teams = len(weights), len(widths)
    best: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {0: ((), (0,))}
    for number, width in enumerate(widths):
        longer: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {}
        lasts = [num_devices] if number == num_teams - 1 else range(number + 1, num_devices - num_teams + number + 2)
        for stop in lasts:
            found = []
            for start, (costs, stops) in best.items():
                if start < stop:
                    work = sum(weights[start:stop])
                    cost = width / work if work > 0 else float("inf")
                    found.append((tuple(sorted((*costs, cost), reverse=True)), (*stops, stop)))
            longer[stop] = min(found)
        best = longer
    stops = best[num_devices][1]
    return [Range(start=start, stop=stop) for start, stop in pairwise(stops)]


def _of_team(weights: Sequence[float], team: Range) -> list[float]:
    own = list(weights[team.start : team.stop])
    return own if any(own) else [1.0] * len(team)


def _shifted(part: Range, by: int) -> Range:
    return Range(start=part.start + by, stop=part.stop + by)
