"""`src.memory`, by the page faults that the system counts."""

import subprocess
import sys

COUNT = """
import resource, sys
import torch
from src.memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "kept" else False


def step():
    a = torch.ones(16 * 2**20)  # 64 MB: 16384 pages
    return a.mul_(2).sum().item()


for _ in range(4):
    step()  # the heap grows until everything has its place
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), sorted(faults)[4])  # the median: a system short of memory may take pages back for itself
"""


def test_freed_buffers_are_used_again_without_a_page_fault():
    def faults(how: str) -> tuple[bool, int]:
        words = [sys.executable, "-c", COUNT, how]
        kept, count = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
        return kept == "1", int(count)

    kept, without_maps = faults("kept")
    assert kept
    assert without_maps < 100
    assert faults("given back")[1] >= 16384
