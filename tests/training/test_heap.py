"""Memory that was freed stays with the process, or does not."""

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

RETURNING = """
import sys, torch
from isthmus.reporting.host_memory import resident_bytes
from isthmus.training.heap import return_freed_memory, reuse_freed_memory
was_set = sys.argv[1] != "unset" and return_freed_memory()
if sys.argv[1] == "set and unset":
    reuse_freed_memory()
kept = []
torch.ones(7_000_000)  # blocks as large as this would be kept from now on
before = resident_bytes()
for _ in range(5):
    freed = torch.ones(2_000_000)
    kept.append(torch.ones(50_000))  # lies behind it
    del freed
print(was_set, resident_bytes() - before)
"""


def test_memory_that_is_freed_between_what_is_used_goes_back_where_that_is_wanted() -> None:
    found = {}
    for choice in ("set", "set and unset", "unset"):
        command = [sys.executable, "-c", RETURNING, choice]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.split()
        found[choice] = printed[0] == "True", int(printed[1])
    is_set, more_bytes = found["set"]
    assert not is_set or more_bytes < 3_000_000  # of 1,000,000 that are used; one that was freed is 8,000,000
    assert not is_set or more_bytes < min(found["unset"][1], found["set and unset"][1])


def test_a_tensor_freed_and_made_again_costs_no_page_faults() -> None:
    printed = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=100)
    was_set, num_faults = printed.stdout.split()
    # 40 MB are 9,766 pages, ten times over; by default each is touched anew.
    assert was_set == "False" or int(num_faults) < 1000
