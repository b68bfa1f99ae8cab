"""What a process keeps of the memory that it has freed."""

import subprocess
import sys

import pytest

CODE = """
import torch
from vitapack.runtime.loading import memory

def kept():
    before = memory.resident()
    large, small = zip(*((torch.ones(2 << 20), torch.ones(1 << 17)) for _ in range(20)))
    del large  # 160 MiB, a block that stays after each
    return memory.resident() - before

memory.return_large_blocks()
print(kept())
with memory.large_blocks_reused():
    print(kept())
assert memory._threshold == memory.LARGE
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_holes_are_kept_or_not():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    without, holes = map(int, out.stdout.split())
    assert without < 40 << 20 < 120 << 20 < holes
