"""Which layers form stages, and which device has which stage (APTMoE, section 3): any devices, hosts and PCIe roots.

Stage ``s`` is on the device at position ``s`` mod D of an order in which neighbours load through different roots. What
is looked for are the cuts with the least predicted step,

    max over devices of the seconds of its stages, times (M·R + D - 1) ÷ (M·R),

M micro-batches and R = S ÷ D rounds, and no less than the first device's, what lies outside the layers included, such
that every device has room for any two of its stages that follow one another
(one runs, the next is loaded) beside what it keeps for the whole step, and every host for what its devices' layers
need. Slower devices so get fewer layers. More stages shorten the bubble, hand-overs speak for fewer.

What was measured is never exact, so ``choose_cuts`` leaves equal cuts as they are unless others are a good deal
shorter, or those do not fit.

All cuts are weighed where there are few. Otherwise cuts begin where every device has had its part of the work so far,
and runs of neighbouring cuts are moved by some layers as long as that helps; a few times all are shaken and it is done
again.

Legend: ``L`` layers, ``S`` stages, ``D`` devices, ``N`` ways of cutting that are weighed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.roots import order_by_roots
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Stage

Floats = NDArray[np.float64]
Cuts = NDArray[np.int64]

MAX_LAYERS_OF_ALL_STAGES = 12
"""Up to so many layers every number of stages is weighed, beyond them whole rounds, and a stage for each layer."""
MAX_WAYS = 20_000
"""Up to so many ways of cutting all are weighed."""
MAX_MOVES = 200
MOVES = (1, 2, 4)
"""By how many layers cuts are moved."""
NUM_SHAKES = 12
LEAST_GAIN = 0.05
"""By so much of the step a mapping must be predicted shorter than equal cuts to be taken instead. What was measured of
devices that are alike differs by a few percent, and no mapping can gain more than loads differ by; one layer more or
less of a device's ten is 10 %."""
BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class LayerNeeds:
    """One layer, in a step."""

    seconds: tuple[float, ...]
    """On each device (D,), forward and backward of all micro-batches."""
    held_bytes: int
    """On its device while it is held: weights."""
    gradient_bytes: int = 0
    """Beside it, of all layers of a stage at once, and of one stage at a time."""
    kept_bytes: int = 0
    """On its device for the whole step: activations."""
    host_bytes: int = 0
    """On its device's host: weights, gradients, moments."""


@dataclass(frozen=True, kw_only=True)
class DevicePlace:
    """Where a device is, and what it has room for."""

    host: int
    root: int
    """Of all PCIe roots, whatever host they are of."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class MappingProblem:
    """Layers in execution order, devices, hosts."""

    layers: tuple[LayerNeeds, ...]
    devices: tuple[DevicePlace, ...]
    host_memory_bytes: tuple[int, ...]
    num_micro_batches: int
    handover_s: float = 0.0
    """What every stage takes beside its layers: all micro-batches in and out, both ways."""
    outer_s: float = 0.0
    """What lies outside every layer (embeddings, head, loss) takes on the first stage's device. That computes it while
    the pipeline fills and drains, as far as there is time; the last micro-batch's part comes after everything."""

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            if len(layer.seconds) != len(self.devices):
                raise ValueError(f"layers[{number}].seconds: got {len(layer.seconds)}, wanted {len(self.devices)}")
        if beyond := [device.host for device in self.devices if device.host >= len(self.host_memory_bytes)]:
            raise ValueError(f"host_memory_bytes: got {len(self.host_memory_bytes)} hosts, a device is of {beyond[0]}")


@dataclass(frozen=True, kw_only=True)
class StageMapping:
    """``devices``: of each stage (S,). ``load_s``: of each device (D,), without the bubble, with what lies outside the
    layers. ``short_bytes``: of memory, on all devices and hosts together; 0: it fits."""

    stages: tuple[Stage, ...]
    devices: tuple[int, ...]
    step_s: float
    load_s: tuple[float, ...]
    is_exact: bool
    """Whether every way of cutting was weighed."""
    short_bytes: int = 0


def device_order(places: Sequence[tuple[int, int]]) -> list[int]:
    """The devices, of each of which ``places`` has (host, PCIe root), in the order in which stages go round: host by
    host, and on a host as ``order_by_roots`` has it."""
    order: list[int] = []
    for host in sorted({host for host, _ in places}):
        own = [number for number, (own_host, _) in enumerate(places) if own_host == host]
        order += [own[at] for at in order_by_roots([places[number][1] for number in own])]
    return order


def choose_cuts(problem: MappingProblem, equal: Sequence[Stage]) -> StageMapping:
    """``equal`` unless as many other stages are predicted ``LEAST_GAIN`` shorter, or less memory is missing with them.
    ``short_bytes`` says whether what is returned fits. Pure and deterministic. Raises ``IsthmusError`` for stages that
    are fewer than devices."""
    _check_stages(problem, len(equal))
    weigher = _Weigher(problem)
    evenly = weigher.mapping(weigher.weighed(equal), is_exact=False)
    best = weigher.best(len(equal))
    found = weigher.mapping(best, is_exact=best.is_exact)
    if found.short_bytes == evenly.short_bytes:
        return found if found.step_s < (1 - LEAST_GAIN) * evenly.step_s else evenly
    return found if found.short_bytes < evenly.short_bytes else evenly


def predict_cuts(problem: MappingProblem, stages: Sequence[Stage]) -> StageMapping:
    """What a step with these stages takes, however good they are. Raises as ``choose_cuts``."""
    _check_stages(problem, len(stages))
    weigher = _Weigher(problem)
    return weigher.mapping(weigher.weighed(stages), is_exact=False)


def map_layers(problem: MappingProblem, num_stages: int | None = None) -> StageMapping:
    """The best mapping, with ``num_stages`` stages or any number of them. Pure and deterministic.

    Raises ``IsthmusError`` for fewer stages than devices, more than layers, and for what does not fit, saying what is
    missing where least is.
    """
    num_layers, num_devices = len(problem.layers), len(problem.devices)
    _check_stages(problem, num_stages)
    weigher = _Weigher(problem)
    if num_stages is not None:
        numbers: Sequence[int] = (num_stages,)
    elif num_layers <= MAX_LAYERS_OF_ALL_STAGES:
        numbers = range(num_devices, num_layers + 1)
    else:
        numbers = sorted({*range(num_devices, num_layers + 1, num_devices), num_layers})
    found = [weigher.best(number) for number in numbers]
    best = min(found, key=lambda one: (*one.key, len(one.cuts)))
    if best.short_bytes > 0:
        raise IsthmusError(
            f"memory: no way of cutting {num_layers} layers into stages fits {num_devices} devices and their hosts: "
            f"{best.short_bytes / 2**30:.3g} GiB are missing in the best one; lower the batch or the sequence length, "
            "or take more devices or memory"
        )
    are_all = num_stages is not None or num_layers <= MAX_LAYERS_OF_ALL_STAGES
    return weigher.mapping(best, is_exact=are_all and all(one.is_exact for one in found))


def _check_stages(problem: MappingProblem, num_stages: int | None) -> None:
    num_layers, num_devices = len(problem.layers), len(problem.devices)
    if num_devices > num_layers:
        raise IsthmusError(f"devices: got {num_devices} for {num_layers} layers, wanted one layer or more for each")
    if num_stages is not None and not num_devices <= num_stages <= num_layers:
        raise IsthmusError(
            f"num_stages: got {num_stages}, wanted {num_devices}, the devices, to {num_layers}, the layers; leave it "
            "out to have it chosen"
        )


@dataclass(frozen=True)
class _Weighed:
    cuts: Cuts
    """(S + 1,): where stages begin, and one past the last layer."""
    step_s: float
    squares: float
    """Of all loads: of equal steps the one with the more even loads."""
    short_bytes: float
    is_exact: bool

    @property
    def key(self) -> tuple[float, float, float]:
        """What has to become less."""
        return self.short_bytes, self.step_s, self.squares


class _Weigher:
    """Weighs many ways of cutting at once."""

    def __init__(self, problem: MappingProblem) -> None:
        self.problem = problem
        self.order = device_order([(device.host, device.root) for device in problem.devices])
        seconds_LD = np.array([layer.seconds for layer in problem.layers], dtype=np.float64)[:, self.order]
        self._seconds = _sums(seconds_LD)
        """(L + 1, D) of all layers before, by position in the order; likewise below (L + 1,)."""
        self._held, self._gradients, self._kept, self._hosted = (
            _sums(np.array([getattr(layer, name) for layer in problem.layers], dtype=np.float64))
            for name in ("held_bytes", "gradient_bytes", "kept_bytes", "host_bytes")
        )
        self._memory_D = np.array([problem.devices[device].memory_bytes for device in self.order], dtype=np.float64)
        hosts_D = [problem.devices[device].host for device in self.order]
        self._is_on_host = np.array(
            [[host == own for host in range(len(problem.host_memory_bytes))] for own in hosts_D]
        )
        self._host_memory = np.array(problem.host_memory_bytes, dtype=np.float64)

    def best(self, num_stages: int) -> _Weighed:
        """Of this number of stages."""
        num_layers = len(self.problem.layers)
        is_exact = comb(num_layers - 1, num_stages - 1) <= MAX_WAYS
        if not is_exact:
            return self._searched(num_stages)
        inner = list(combinations(range(1, num_layers), num_stages - 1))
        ends = np.broadcast_to(np.array([0, num_layers]), (len(inner), 2))
        middle = np.array(inner, dtype=np.int64).reshape(len(inner), num_stages - 1)
        ways = np.concatenate([ends[:, :1], middle, ends[:, 1:]], axis=1)
        return self._least(ways, is_exact=True)

    def weighed(self, stages: Sequence[Stage]) -> _Weighed:
        """These stages."""
        cuts = np.array([0, *(stage.last_layer + 1 for stage in stages)], dtype=np.int64)
        return self._least(cuts[None], is_exact=False)

    def mapping(self, weighed: _Weighed, *, is_exact: bool) -> StageMapping:
        bounds = weighed.cuts.tolist()
        load_s = [0.0] * len(self.order)
        for device, seconds in zip(self.order, self._loads(weighed.cuts[None])[0].tolist(), strict=True):
            load_s[device] = seconds
        load_s[self.order[0]] += self.problem.outer_s
        return StageMapping(
            stages=tuple(Stage(first_layer=first, last_layer=last - 1) for first, last in pairwise(bounds)),
            devices=tuple(self.order[number % len(self.order)] for number in range(len(bounds) - 1)),
            step_s=weighed.step_s,
            load_s=tuple(load_s),
            is_exact=is_exact,
            short_bytes=max(0, round(weighed.short_bytes)),
        )

    # --- weighing ----------------------------------------------------------------------------------------------------

    def _least(self, ways: Cuts, *, is_exact: bool) -> _Weighed:
        """The best of ``ways`` (N, S + 1)."""
        loads_ND, outer_s = self._loads(ways), self.problem.outer_s
        short_N = self._short(ways)
        slots = self.problem.num_micro_batches * (ways.shape[1] - 1) / len(self.order)
        step_N = loads_ND.max(axis=1) * (slots + len(self.order) - 1) / slots
        loads_ND[:, 0] += outer_s
        step_N = np.maximum(step_N + outer_s / self.problem.num_micro_batches, loads_ND[:, 0])
        squares_N = np.square(loads_ND).sum(axis=1)
        best = np.lexsort((squares_N, step_N, short_N))[0]
        return _Weighed(
            cuts=ways[best],
            step_s=float(step_N[best]),
            squares=float(squares_N[best]),
            short_bytes=float(short_N[best]),
            is_exact=is_exact,
        )

    def _by_round(self, of_stages: Floats) -> Floats:
        """(N, S) as (N, R, D), zeros where the last round has no stage."""
        num_devices = len(self.order)
        missing = -of_stages.shape[1] % num_devices
        return np.pad(of_stages, ((0, 0), (0, missing))).reshape(len(of_stages), -1, num_devices)

    def _loads(self, ways: Cuts) -> Floats:
        """(N, D) seconds of each device, by position."""
        positions = np.arange(ways.shape[1] - 1) % len(self.order)
        seconds_NS = self._seconds[ways[:, 1:], positions] - self._seconds[ways[:, :-1], positions]
        return self._by_round(seconds_NS + self.problem.handover_s).sum(axis=1)

    def _short(self, ways: Cuts) -> Floats:
        """(N,) bytes that are missing on devices and hosts, all together."""
        held, gradients, kept, hosted = (
            self._by_round(sums[ways[:, 1:]] - sums[ways[:, :-1]])
            for sums in (self._held, self._gradients, self._kept, self._hosted)
        )
        most_ND = held.max(axis=1)
        if held.shape[1] > 1:
            most_ND = np.maximum(most_ND, (held[:, 1:] + held[:, :-1]).max(axis=1))
        devices_ND = most_ND + gradients.max(axis=1) + kept.sum(axis=1) - self._memory_D
        hosts_NH = hosted.sum(axis=1) @ self._is_on_host - self._host_memory
        return np.maximum(devices_ND, 0).sum(axis=1) + np.maximum(hosts_NH, 0).sum(axis=1)

    # --- searching ---------------------------------------------------------------------------------------------------

    def _searched(self, num_stages: int) -> _Weighed:
        starts = np.stack([self._in_proportion(num_stages), _evenly(self._held, num_stages)])
        best = self._improved(self._least(starts, is_exact=False))
        random = np.random.default_rng(0)
        for _ in range(NUM_SHAKES):
            shaken = self._improved(self._least(_shaken(best.cuts, random)[None], is_exact=False))
            best = min(best, shaken, key=lambda one: one.key)
        return best

    def _improved(self, best: _Weighed) -> _Weighed:
        """Moves as long as one helps: first to where it fits, then to where it is fastest."""
        for _ in range(MAX_MOVES):
            other = self._least(_moved(best.cuts), is_exact=False)
            if other.key >= best.key:
                break
            best = other
        return best

    def _in_proportion(self, num_stages: int) -> Cuts:
        """Every device takes layers up to its part of the least time in which all are taken."""
        low, high = 0.0, 2 * float(self._seconds[-1].max()) * len(self.order)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._taken(num_stages, middle) is not None else (middle, high)
        cuts = self._taken(num_stages, high)
        assert cuts is not None
        return cuts

    def _taken(self, num_stages: int, load_s: float) -> Cuts | None:
        """The cuts where no device has more than its part of ``load_s`` after any round; None if layers are left."""
        num_layers, num_devices = len(self._seconds) - 1, len(self.order)
        rounds = -(-num_stages // num_devices)
        spent, cuts = [0.0] * num_devices, [0]
        for number in range(num_stages):
            position = number % num_devices
            allowed = load_s * (number // num_devices + 1) / rounds - spent[position]
            first = cuts[-1]
            seconds = self._seconds[:, position]
            last = int(np.searchsorted(seconds, seconds[first] + allowed, side="right")) - 1
            last = min(max(last, first + 1), num_layers - (num_stages - 1 - number))
            spent[position] += float(seconds[last] - seconds[first])
            cuts.append(last)
        return np.array(cuts) if cuts[-1] == num_layers else None


def _sums(values: Floats) -> Floats:
    """Of all before each, and of all."""
    return np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])


def _evenly(sums: Floats, num_stages: int) -> Cuts:
    """Cuts into stages of as equal bytes as steps of one layer allow, none empty."""
    num_layers = len(sums) - 1
    wanted = sums[-1] * np.arange(1, num_stages) / num_stages
    inner = np.searchsorted(sums, wanted).astype(np.int64)
    numbers = np.arange(1, num_stages)
    # Apart by one or more, and so many left on either side.
    inner = np.maximum.accumulate(np.maximum(inner, numbers) - numbers) + numbers
    inner = np.minimum(inner, num_layers - num_stages + numbers)
    return np.concatenate([[0], inner, [num_layers]])


def _moved(cuts: Cuts) -> Cuts:
    """(N, S + 1): every run of neighbouring cuts moved by some layers, forth or back, as long as no stage becomes
    empty; the first way is ``cuts``."""
    inner = range(1, len(cuts) - 1)
    spans = np.array([(first, last) for first in inner for last in range(first, len(cuts) - 1)])
    if not len(spans):
        return cuts[None]
    at = np.arange(len(cuts))
    is_moved = ((at >= spans[:, :1]) & (at <= spans[:, 1:])).astype(np.int64)
    ways = np.concatenate([cuts + by * is_moved for step in MOVES for by in (step, -step)])
    return np.concatenate([cuts[None], ways[(np.diff(ways, axis=1) > 0).all(axis=1)]])


def _shaken(cuts: Cuts, random: np.random.Generator) -> Cuts:
    """Sizes of stages exchanged: those of some neighbouring stages in another order."""
    sizes = np.diff(cuts)
    first = int(random.integers(0, max(1, len(sizes) - 1)))
    last = int(random.integers(first + 1, len(sizes) + 1))
    sizes[first:last] = random.permutation(sizes[first:last])
    return np.concatenate([[0], np.cumsum(sizes)])
