"""Earth Mover's Distance between point clouds, exact to a certified gap.

Start at `emd(x, y)`. solve.py checks and prepares the clouds; csrc/emd/auction.cpp solves them on
CPUs, cuda.py with csrc/emd/auction.cu on GPUs. May import: only vitapack's compiled modules.
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
