"""``isthmus`` on two devices: processes of this host, started as torchrun would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from isthmus.transport.rendezvous import held_port

ISTHMUS = str(Path(sys.executable).parent / "isthmus")


def run_on_two(*arguments: str) -> list[tuple[str, str]]:
    """What each prints to (stdout, stderr). Both must succeed."""
    with held_port() as port:
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [ISTHMUS, *arguments],
                env={**os.environ, **variables, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                with process:  # which waits for it, and closes its pipes
                    process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs
