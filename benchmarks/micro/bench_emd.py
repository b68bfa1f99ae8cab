"""Earth Mover's Distance of one pair of clouds on one core."""

import numpy as np
import pytest

from vitapack.kernels.emd import emd


@pytest.mark.parametrize("points", [256, 1024])
def bench_emd(benchmark, points):
    rng = np.random.default_rng(0)
    x, y = (np.abs(rng.normal(size=(points, 3))) for _ in range(2))
    benchmark(emd, x, y, threads=1)
