"""One process of `benchmarks.cpu`'s part `memory`: loads a packed file and runs two steps."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.cpu.mini import inputs
from vitapack.kernels.linear import cpu
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.pipeline.load import load_dit


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes; Linux only."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) * 1024


def main() -> None:
    path, latents = Path(sys.argv[1]), int(sys.argv[2])
    args = inputs(latents)
    cpu.available()
    before = resident("VmRSS")  # interpreter, torch and the inputs
    started = time.perf_counter()
    dit = load_dit(path, compute="a8")
    loaded = time.perf_counter() - started
    after = resident("VmRSS")
    with torch.no_grad():
        for _ in range(2):
            out = dit(*args)
    peak = resident("VmHWM") - before
    weights = sum(m.panels.nbytes for m in dit.modules() if isinstance(m, CpuLinear))
    weights += sum(t.nbytes for t in dit.parameters()) + sum(t.nbytes for t in dit.buffers())
    scratch = dit.scratch.nbytes  # type: ignore[operator]
    paper = weights + scratch + out.nbytes
    print(
        json.dumps(
            {
                "file_bytes": path.stat().st_size,
                "load_seconds": loaded,
                "weight_bytes": weights,
                "scratch_bytes": scratch,
                "counted_bytes": paper,
                "peak_bytes": peak,
                "after_load_bytes": after - before,
                "before_bytes": before,
                "ratio": peak / paper,
            }
        )
    )


if __name__ == "__main__":
    main()
