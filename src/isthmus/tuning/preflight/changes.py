"""What would help: the question asked again with one thing changed, each change predicted like the question itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from isthmus.planning.memory import Blueprint
from isthmus.reporting.human import human_memory
from isthmus.spec.plan_tune import Change
from isthmus.spec.tune_cluster import TuneAccelerator, TuneCluster, TuneHost
from isthmus.tuning.preflight.predict import Prediction, Question, predict, predict_memory

MOST_CHANGES = 3
LEAST_GAIN = 1.02
"""What gains less is not worth a line."""
MORE_HOSTS = (2, 4, 8)
CHOSEN_IN_FLIGHT = "--micro-batches-in-flight left out, to be chosen"
GIB = 1 << 30


def find_changes(
    question: Question,
    prediction: Prediction,
    blueprint: Callable[[str], Blueprint],
    tell: Callable[[str, float], None] = lambda text, share: None,
) -> tuple[Change, ...]:
    """The changes that help most, best first: those with which it fits, or those with which it is faster.

    ``blueprint(dtype)``: the same model's in another dtype. ``tell`` gets what is being tried, and the share done.
    Blocks as long as some ten predictions.
    """
    tried = list(_for_speed(question, prediction, blueprint) if prediction.fits else _for_room(question, prediction))
    found: list[Change] = []
    for number, (text, resource, changed) in enumerate(tried):
        tell(text, number / len(tried))
        found.append(_change(text, resource, prediction, predict(changed)))
    if prediction.step is not None:
        useful = [change for change in found if (change.gain or 0) >= LEAST_GAIN]
    else:
        useful = [change for change in found if change.fits and (change.tokens_per_s or not prediction.fits)]
    return tuple(sorted(useful, key=lambda change: -(change.tokens_per_s or 0))[:MOST_CHANGES])


def limiting(prediction: Prediction, changes: Sequence[Change]) -> str:
    """The resource of which more helps most, or the busiest one; empty without a step."""
    if prediction.step is None:
        return ""
    of_resources = [change.resource for change in changes if change.resource and change.gain]
    shares = prediction.step.busy_shares
    return of_resources[0] if of_resources else max(shares, key=lambda name: shares[name])


def _change(text: str, resource: str, before: Prediction, after: Prediction) -> Change:
    rate = after.step.tokens_per_s if after.step else None
    gain = rate / before.step.tokens_per_s if rate and before.step else None
    return Change(change=text, resource=resource, fits=after.fits, tokens_per_s=rate, gain=gain)


Tried = tuple[str, str, Question]
"""(change, resource, question)"""


def _for_speed(question: Question, prediction: Prediction, blueprint: Callable[[str], Blueprint]) -> Iterator[Tried]:
    spec, cluster = question.blueprint.spec, question.cluster
    number, num_devices = question.micro_batches, cluster.num_accelerators
    yield f"--micro-batches {2 * number} instead of {number}", "", replace(question, micro_batches=2 * number)
    if question.policy != "affinity":
        yield "--policy affinity", "", replace(question, policy="affinity")
    if question.micro_batches_in_flight is not None and prediction.num_in_flight < number:
        yield CHOSEN_IN_FLIGHT, "", replace(question, micro_batches_in_flight=None)
    if question.num_stages is not None:
        yield "--num-stages left out, to be chosen", "", replace(question, num_stages=None)
    if prediction.step is not None and (question.num_stages is not None or question.policy != "affinity"):
        # Left to itself, affinity has weighed them.
        for stages in (2 * prediction.step.num_stages, prediction.step.num_stages // 2):
            if num_devices <= stages <= spec.num_layers:
                yield f"--num-stages {stages}", "", replace(question, num_stages=stages)
    if question.blueprint.dtype == "fp32" and _has_rates(cluster, "bf16"):
        yield "--dtype bf16 instead of fp32", "", replace(question, blueprint=blueprint("bf16"))
    yield "accelerators with twice the memory", "accelerator memory", on_accelerators(question, _more_memory)
    yield "accelerators that compute twice as fast", "accelerators", on_accelerators(question, _faster)
    faster = replace(question, cluster=_faster_links(cluster))
    yield "links to the accelerators twice as fast", "links to the accelerators", faster
    yield "twice the CPU cores on each host", "CPU cores", on_hosts(question, _more_cores)
    yield "host memory twice as fast", "host memory's bandwidth", on_hosts(question, _faster_memory)
    if sum(host.count for host in cluster.hosts) > 1:
        yield "networks between hosts ten times as fast", "networks", on_hosts(question, _faster_network)
    if 2 * num_devices <= spec.num_layers:
        yield "twice as many hosts", "", on_hosts(question, _more_hosts)


def _for_room(question: Question, prediction: Prediction) -> Iterator[Tried]:
    short_hosts = [need for need in prediction.hosts if need.short_bytes]
    texts, larger = [], question
    if short_devices := [need for need in prediction.devices if need.short_bytes]:
        least = -(-max(need.minimum_bytes for need in short_devices) // GIB) * GIB
        texts.append(f"accelerators with {human_memory(least)}")
        larger = on_accelerators(larger, lambda card: replace(card, memory_bytes=max(card.memory_bytes, least)))
    if short_hosts:
        least_host = -(-max(need.total_bytes for need in short_hosts) // GIB) * GIB
        texts.append(f"hosts with {human_memory(least_host)}")
        larger = on_hosts(larger, lambda host: replace(host, memory_bytes=max(host.memory_bytes, least_host)))
    yield " and ".join(texts), "memory", larger
    if question.micro_batches_in_flight is not None:
        # Left out, as few are taken as need be; fewer micro-batches would save no more.
        yield CHOSEN_IN_FLIGHT, "", replace(question, micro_batches_in_flight=None)
    for factor in MORE_HOSTS:
        if factor * question.cluster.num_accelerators > question.blueprint.spec.num_layers:
            break
        more = on_hosts(question, lambda host, factor=factor: replace(host, count=factor * host.count))
        if _has_room(more):
            yield f"{factor} times as many hosts", "", more
            break


def _has_room(question: Question) -> bool:
    return not any(need.short_bytes for need in predict_memory(question))


def on_hosts(question: Question, change: Callable[[TuneHost], TuneHost]) -> Question:
    """The question with every host changed."""
    cluster = question.cluster
    return replace(question, cluster=replace(cluster, hosts=tuple(change(host) for host in cluster.hosts)))


def on_accelerators(question: Question, change: Callable[[TuneAccelerator], TuneAccelerator]) -> Question:
    """The question with every accelerator changed."""
    return on_hosts(question, lambda host: replace(host, accelerator=change(host.accelerator)))


def _has_rates(cluster: TuneCluster, dtype: str) -> bool:
    return all(dtype in host.accelerator.flops_per_s and dtype in host.core_flops_per_s for host in cluster.hosts)


def _more_memory(card: TuneAccelerator) -> TuneAccelerator:
    return replace(card, memory_bytes=2 * card.memory_bytes)


def _faster(card: TuneAccelerator) -> TuneAccelerator:
    rates = {dtype: 2 * rate for dtype, rate in card.flops_per_s.items()}
    return replace(card, flops_per_s=rates, memory_bytes_per_s=2 * card.memory_bytes_per_s, expert_s=card.expert_s / 2)


def _faster_links(cluster: TuneCluster) -> TuneCluster:
    """Accelerators' links and the roots that they share; what was measured of loads counts half."""

    def faster(host: TuneHost) -> TuneHost:
        card = host.accelerator
        card = replace(card, h2d_bytes_per_s=2 * card.h2d_bytes_per_s, d2h_bytes_per_s=2 * card.d2h_bytes_per_s)
        return replace(host, accelerator=card, root_bytes_per_s=2 * host.root_bytes_per_s)

    experts = {
        shape: replace(
            measured,
            load_s=None if measured.load_s is None else measured.load_s / 2,
            dense_load_s=None if measured.dense_load_s is None else measured.dense_load_s / 2,
        )
        for shape, measured in cluster.experts.items()
    }
    return replace(cluster, hosts=tuple(faster(host) for host in cluster.hosts), experts=experts)


def _more_cores(host: TuneHost) -> TuneHost:
    return replace(host, num_cores=2 * host.num_cores)


def _faster_memory(host: TuneHost) -> TuneHost:
    return replace(host, memory_bytes_per_s=2 * host.memory_bytes_per_s)


def _faster_network(host: TuneHost) -> TuneHost:
    return replace(host, network_bytes_per_s=10 * host.network_bytes_per_s)


def _more_hosts(host: TuneHost) -> TuneHost:
    return replace(host, count=2 * host.count)
