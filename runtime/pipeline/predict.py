"""Predicts the memory that a process holds in addition to its networks, before loading anything.

Networks predict their own working memory (`Network.step_bytes`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from vitapack.runtime.loading.memory import resident

# Memory that a process on a CPU allocates after its pipeline was made, in addition to tensors: code
# and buffers of oneDNN and MKL, and the packages that surface extraction imports. 90 to 120 MB
# (torch 2.13).
LIBRARIES = 110 << 20
MESHING = 65 << 20  # included in LIBRARIES: scipy, scikit-image, trimesh
IMPORTED = {
    "transformers": 220 << 20
}  # packages that components import; of transformers only its DINOv2
CUBLAS = 32 << 20  # torch's workspace for cuBLAS, per stream: 32 MiB on sm_90, 8 on others


def base_bytes(device: str, cuda_graphs: bool = False) -> int:
    """Bytes in use in addition to weights and activations. On a CPU: the process's current resident
    set plus LIBRARIES. On a GPU, torch's allocations only: one cuBLAS workspace, and with
    `cuda_graphs` a second one for the capture stream."""
    if device == "cpu":
        return (resident() or 0) + LIBRARIES
    return CUBLAS * (1 + cuda_graphs)


def imported_bytes(packages: Collection[str]) -> int:
    """Bytes that importing these packages will add; packages already imported count 0."""
    return sum(IMPORTED[package] for package in packages if package not in sys.modules)


def late_imported_bytes(packages: Collection[str]) -> int:
    """Bytes of `base_bytes` that the packages of surface extraction allocate when it starts: 0 if
    the encoder's `packages` or an earlier extraction import scipy first."""
    return 0 if packages or "scipy" in sys.modules else MESHING
