"""Memory that a process holds around its networks, for predictions before anything is loaded.

Networks predict their own working memory (`Network.step_bytes`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from vitapack.runtime.loading.memory import resident

# What a process on a CPU takes once it computes, beside tensors and what it had when its pipeline
# was made: code and buffers of oneDNN and MKL, scipy, scikit-image. 90 to 120 MB (torch 2.13).
LIBRARIES = 110 << 20
IMPORTED = {"transformers": 220 << 20}  # packages that components import, its DINOv2 alone
CUBLAS = 32 << 20  # torch's workspace for it, a stream: 32 MiB on sm_90, 8 on others


def base_bytes(device: str, cuda_graphs: bool = False) -> int:
    """What peaks stand on: on a CPU the process as it is now, with its libraries once they work; on
    a GPU cuBLAS' workspace, since torch's own allocations are counted there, and with `cuda_graphs`
    another one on the stream that they are recorded on."""
    if device == "cpu":
        return (resident() or 0) + LIBRARIES
    return CUBLAS * (1 + cuda_graphs)


def imported_bytes(packages: Collection[str]) -> int:
    """Bytes that importing these packages will add, for those that are not imported yet."""
    return sum(IMPORTED[package] for package in packages if package not in sys.modules)
