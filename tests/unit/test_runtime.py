"""What is settled about the process before training starts."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys, torch
from mapo_lightning.runtime import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def update():
    x = torch.ones(12_000_000)
    return float((x + x)[0])
for _ in range(10):
    update()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    update()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    words = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_freed_blocks_are_used_again_without_page_faults() -> None:
    assert faults("keep") < faults("give back") / 4
