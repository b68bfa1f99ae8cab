"""Memory that a process holds around its networks, for predictions before anything is loaded.

Networks predict their own working memory (`Network.step_bytes`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from vitapack.runtime.loading.memory import resident

# Memory that a process on a CPU takes while it computes, in addition to tensors and to what it held
# when its pipeline was made: code and buffers of oneDNN and MKL, and the packages that surface
# extraction imports. 90 to 120 MB (torch 2.13).
LIBRARIES = 110 << 20
MESHING = 65 << 20  # of these: scipy, scikit-image, trimesh
IMPORTED = {"transformers": 220 << 20}  # packages that components import; of this its DINOv2 alone
CUBLAS = 32 << 20  # torch's workspace for cuBLAS, per stream: 32 MiB on sm_90, 8 on others


def base_bytes(device: str, cuda_graphs: bool = False) -> int:
    """Memory to which weights and activations are added: on a CPU the process's now, with all its
    libraries at work; on a GPU, where torch's allocations are counted, cuBLAS's workspace, and with
    `cuda_graphs` another one for the stream on which they are captured."""
    if device == "cpu":
        return (resident() or 0) + LIBRARIES
    return CUBLAS * (1 + cuda_graphs)


def imported_bytes(packages: Collection[str]) -> int:
    """Bytes that importing these packages will add, for those that are not imported yet."""
    return sum(IMPORTED[package] for package in packages if package not in sys.modules)


def late_imported_bytes(packages: Collection[str]) -> int:
    """Bytes of `base_bytes` that are allocated only by surface extraction: its packages, unless the
    encoder's `packages` import scipy already, or an earlier surface has."""
    return 0 if packages or "scipy" in sys.modules else MESHING
