"""One machine with one accelerator as a cluster, from what was measured there instead of from data sheets."""

from __future__ import annotations

from isthmus.planning.curves import evaluate
from isthmus.planning.problem import expert_times
from isthmus.simulation.tuning.costs import ADAM_BYTES_PER_PARAMETER
from isthmus.spec.model import ModelSpec
from isthmus.spec.profile import Profile
from isthmus.spec.tune_cluster import MeasuredExperts, TuneAccelerator, TuneCluster, TuneHost

AT_ONCE_BYTES_PER_S = 1e15
"""What the accelerator takes to read an expert is in the seconds that were measured of one token."""


def cluster_of(
    profile: Profile,
    spec: ModelSpec,
    *,
    num_tokens: int,
    seq_len: int,
    memory_bytes: int,
    num_processes: int = 1,
    name: str = "this machine",
) -> TuneCluster:
    """The machine of ``profile``, measured with the model of ``spec`` and one of ``num_processes`` alone on its part of
    the cores, with ``memory_bytes`` on each accelerator.

    The accelerator's rate is the one at which a forward pass of ``num_tokens`` tokens (a micro-batch, equally popular
    experts) takes as long as measured. Where there is no separate one, it is the CPU at the end of a link that takes
    no time. Raises ``ValueError`` for a profile of another model.
    """
    machine = profile.hardware
    flops, seconds, least_s = 0.0, 0.0, float("inf")
    experts: dict[str, MeasuredExperts] = {}
    rate_of_core = float("inf")
    for dense_numel, expert in zip(spec.dense_numel, spec.layers, strict=True):
        flops += 2 * dense_numel * num_tokens + 4 * num_tokens * seq_len * spec.hidden_size
        seconds += profile.dense_forward_s_per_token * num_tokens
        if expert is None:
            continue
        times = expert_times(profile, expert)
        per_expert = num_tokens * expert.top_k / expert.num_experts
        flops += num_tokens * expert.top_k * expert.forward_flops_per_token
        seconds += expert.num_experts * float(evaluate(times.accelerator_forward, [per_expert])[0])
        least_s = min(least_s, times.accelerator_forward.seconds[0])
        key = Profile.expert_key(expert.hidden_size, expert.intermediate_size, expert.has_gate)
        experts[key] = MeasuredExperts(cpu_forward=times.cpu_forward, num_cores=machine.num_cpu_threads)
        most, longest_s = times.cpu_forward.num_tokens[-1], times.cpu_forward.seconds[-1]
        rate_of_core = min(rate_of_core, most * expert.forward_flops_per_token / longest_s / machine.num_cpu_threads)
    card = TuneAccelerator(
        name=machine.accelerator_name,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=AT_ONCE_BYTES_PER_S,
        flops_per_s={profile.dtype: flops / seconds},
        h2d_bytes_per_s=_rate(profile.h2d_s_per_byte),
        d2h_bytes_per_s=_rate(profile.d2h_s_per_byte),
        copy_s=profile.copy_latency_s,
        expert_s=least_s,
    )
    host = TuneHost(
        name=machine.cpu_name,
        accelerator=card,
        num_accelerators=num_processes,
        accelerators_per_root=1,
        root_bytes_per_s=max(card.h2d_bytes_per_s, card.d2h_bytes_per_s),
        num_cores=num_processes * machine.num_cpu_threads,
        core_flops_per_s={profile.dtype: rate_of_core},
        memory_bytes=machine.host_memory_bytes,
        memory_bytes_per_s=num_processes * ADAM_BYTES_PER_PARAMETER / profile.optimizer_s_per_parameter,
        network_bytes_per_s=AT_ONCE_BYTES_PER_S,
    )
    return TuneCluster(name=name, hosts=(host,), experts=experts, source=f"measured {profile.measured_at}")


def _rate(s_per_byte: float) -> float:
    return 1 / s_per_byte if s_per_byte else AT_ONCE_BYTES_PER_S
