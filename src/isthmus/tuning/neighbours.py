"""What is measured of one of several processes of a host is measured beside the others: this is the command of each,
see ``profiling.together``; ``profile.profile`` starts it."""

from __future__ import annotations

from isthmus.profiling.together import Meeting
from isthmus.spec.pinning import pin
from isthmus.spec.serialization import from_json, to_json
from isthmus.spec.units import parse_emulate
from isthmus.training.heap import keep_freed_memory
from isthmus.tuning.profile import Neighbour, device_to_measure, measure_blocks


def main() -> None:
    with Meeting.join() as meeting:
        one = from_json(Neighbour, meeting.question)
        pin(one.cores)
        keep_freed_memory()
        emulation = parse_emulate(one.emulate)
        with device_to_measure(one.accelerator, emulation) as device:
            found = measure_blocks(
                one.model,
                device,
                one.sizes,
                emulation=emulation,
                num_cores=one.num_cores,
                num_processes=one.num_processes,
                num_stages=one.num_stages,
                progress=meeting.wait,
            )
        meeting.end(to_json(found))


if __name__ == "__main__":
    main()
