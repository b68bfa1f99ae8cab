"""Earth Mover's Distance between point clouds, exact to a certified gap.

`emd(x, y)` is the entry; solve.py prepares and checks the clouds, csrc/emd/auction.cpp solves them
on CPUs, cuda.py and csrc/emd/auction.cu on GPUs. May import: nothing of vitapack but its compiled
parts.
"""

from vitapack.kernels.emd.solve import (
    DebiasedEMD,
    EMDFloor,
    EMDResult,
    debiased_emd,
    emd,
    emd_floor,
    sample_surface,
)

__all__ = [
    "DebiasedEMD",
    "EMDFloor",
    "EMDResult",
    "debiased_emd",
    "emd",
    "emd_floor",
    "sample_surface",
]
