"""Coarse-to-fine evaluation of a field that costs next to nothing: what the search itself takes."""

import pytest
import torch

from vitapack.runtime.decode.grid import coarse_to_fine, dense
from vitapack.runtime.decode.mesh import surface_from_grid


def torus(points):
    ring = torch.hypot(points[:, 0], points[:, 1]) - 0.6
    return 0.25 - torch.hypot(ring, points[:, 2])


@pytest.mark.parametrize("resolution", [96, 192])
def bench_coarse_to_fine(benchmark, resolution):
    benchmark(coarse_to_fine, torus, resolution, 1.01)


def bench_marching_cubes(benchmark):
    grid = dense(torus, 64, 1.01)
    benchmark(surface_from_grid, grid.values, grid.bounds)
