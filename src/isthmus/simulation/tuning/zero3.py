"""ZeRO-3 with offload as a cost model: every device takes its part of the batch through all layers, whose weights are
gathered before each (Rajbhandari et al., SC 2020 and 2021).

A layer's weights lie in shares on the devices' hosts. Every device loads its share, then a ring passes the shares on:
over PCIe within a host, over the network where hosts differ. Gathering runs while the layer before computes; backward
gathers again and scatters gradients. The optimizer follows on the CPUs.
"""

from __future__ import annotations

from isthmus.simulation.tuning.work import StepWork


def zero3_step_s(work: StepWork) -> float:
    """Seconds of a step; nothing is ever waited for but the longer of gathering and computing, layer by layer."""
    devices = range(len(work.order))
    return max(_device_s(work, device) for device in devices)


def _device_s(work: StepWork, device: int) -> float:
    costs = work.costs
    seat = costs.seats[device]
    host, num = seat.host, len(work.order)
    hosts = {other.host_number for other in costs.seats}
    sharing = host.accelerators_per_root
    rate = min(host.accelerator.h2d_bytes_per_s, host.root_bytes_per_s / sharing)
    back = min(host.accelerator.d2h_bytes_per_s, host.root_bytes_per_s / sharing)
    if len(hosts) > 1:
        ring = min(rate, min(other.host.network_bytes_per_s for other in costs.seats))
    else:
        ring = min(rate, back)
    seconds = first = optimizer_s = 0.0
    for layer in range(costs.spec.num_layers):
        own = costs.layer(device, layer)
        num_bytes = own.dense_bytes + (own.expert.num_experts * own.expert_bytes if own.expert else 0)
        gather = num_bytes / num / rate + num_bytes * (num - 1) / num / ring
        scatter = num_bytes * (num - 1) / num / ring + num_bytes / num / back
        first = first or gather
        for is_backward in (False, True):
            compute = own.num_parts * own.dense_s[is_backward] / num
            if layer in work.tables:
                counts = work.counts[layer]
                problem = own.problem([count / num for count in counts], is_backward=is_backward)
                compute += sum(problem.accelerator_s) if own.expert else 0.0
            # Both directions run at once.
            seconds += max(compute, gather, scatter if is_backward else 0.0)
        optimizer_s += own.optimizer_s / num
    return first + seconds + optimizer_s
