"""Layers to processes for a run of ``isthmus tune``: what ``pipeline/mapping.py`` asks for, from a run's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from isthmus.models.config import load_config, model_spec
from isthmus.planning.flights import smallest_flight
from isthmus.planning.memory import Blueprint
from isthmus.planning.stages import Division, divide
from isthmus.reporting.recorder import Recorder
from isthmus.spec.plan import LayerMapping
from isthmus.spec.profile import Profile
from isthmus.tuning.data import MicroBatch
from isthmus.tuning.measure import at_cpu_speed
from isthmus.tuning.options import TuneOptions
from isthmus.tuning.pipeline.links import Links
from isthmus.tuning.pipeline.mapping import Seat, agree_on_layers
from isthmus.tuning.preflight.blueprint import blueprint_of
from isthmus.tuning.profile import Sizes, device_to_measure, measure_blocks
from isthmus.tuning.session import SessionOptions, accelerator_of


def agree(
    options: TuneOptions,
    session: SessionOptions,
    path: Path,
    largest: MicroBatch,
    links: Links,
    progress: Callable[[str, float], None],
) -> tuple[Division, LayerMapping]:
    """Which rank has which layers of the checkpoint at ``path``; see ``agree_on_layers``. ``largest``: a micro-batch
    that takes as much memory as any. Raises ``IsthmusError`` for more stages than layers or fewer than processes."""
    config = load_config(path, num_layers=options.num_layers)
    equal = divide(model_spec(config), num_ranks=links.size, num_stages=options.num_stages)
    emulation = session.emulation or {}

    def seat() -> Seat:
        with accelerator_of(session, Recorder(enabled=False)) as device:
            memory_bytes = device.budget_bytes if device.is_separate else None
            return Seat.here(device.name, memory_bytes, session.num_cores)

    def blueprint() -> Blueprint:
        return blueprint_of(config, options.dtype, largest.inputs)

    def measure() -> Profile:
        sizes = Sizes(
            dtype=options.dtype,
            seq_len=options.seq_len,
            micro_batch_size=options.micro_batch_size,
            micro_batches=options.micro_batches,
        )
        with device_to_measure(options.accelerator, emulation) as device:
            profile = measure_blocks(
                path,
                device,
                sizes,
                emulation=emulation,
                num_cores=session.num_cores,
                num_layers=options.num_layers,
                num_processes=links.size,
                num_stages=options.num_stages,
                progress=progress,
            )
        return at_cpu_speed(profile, options.cpu_speed)

    return agree_on_layers(
        links,
        equal,
        policy=options.policy,
        num_micro_batches=options.micro_batches,
        num_in_flight=smallest_flight(options.micro_batches, options.micro_batches_in_flight),
        seat=seat,
        blueprint=blueprint,
        measure=measure,
    )
