"""Memory that was freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, torch
from isthmus.training.heap import keep_freed_memory
print(keep_freed_memory())
for _ in range(20):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_tensor_freed_and_made_again_costs_no_page_faults() -> None:
    printed = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=100)
    was_set, num_faults = printed.stdout.split()
    # 40 MB are 9,766 pages, ten times over; by default each is touched anew.
    assert was_set == "False" or int(num_faults) < 1000
