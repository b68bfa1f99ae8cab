"""The fields on which coarse to fine is measured, and the comparison itself."""

import torch

from benchmarks.published.grids import between_nodes, compare, fit
from vitapack.runtime.decode.grid import dense
from vitapack.runtime.families.furniture.family import BOUNDS


def ball(side, radius=0.6):
    axis = torch.linspace(-BOUNDS, BOUNDS, side)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    return 40 * (radius - (x.square() + y.square() + z.square()).sqrt())


def test_the_interpolated_field_is_the_grid_at_its_nodes():
    grid = torch.randn(9, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(dense(between_nodes(grid), 8, BOUNDS).values, grid, atol=1e-5)


def test_a_fitted_decoder_resembles_its_shape_and_is_the_same_each_time():
    network, latents, iou = fit(ball(17), steps=60, points=512)
    again, others, _ = fit(ball(17), steps=60, points=512)
    assert iou > 0.8
    first = dense(network.field(latents), 32, BOUNDS).values
    assert torch.equal(first, dense(again.field(others), 32, BOUNDS).values)


def test_a_sign_that_differs_is_counted():
    full = ball(17).numpy()
    part = full.copy()
    part[8, 8, 8] = -1
    found = compare(full, part, BOUNDS)
    assert found["signs_that_differ"] == 1
    assert not found["same_faces"]
    assert not found["identical"]
