"""Coarse-to-fine evaluation: the dense grid's surface, from a fraction of its queries."""

import pytest
import torch

from vitapack.runtime.errors import UserError
from vitapack.runtime.grid import coarse_to_fine, dense


def sphere(points, radius=0.7):
    return 40 * (radius - points.norm(dim=-1))


def shell(points):
    """A hollow ball with a hole: walls of about a coarse cell."""
    distance = (points.norm(dim=-1) - 0.8).abs() - 0.012
    hole = 0.3 - (points[:, 0].square() + points[:, 1].square()).sqrt()
    hole = torch.minimum(hole, points[:, 2])
    return -30 * torch.maximum(distance, hole)


def wavy(points):
    return torch.sin(5 * points[:, 0]) + torch.cos(4 * points[:, 1]) * points[:, 2] + 0.2


def crossed(values, level=0.0):
    """Cells that marching cubes would look at."""
    inside = values > level
    any_, all_ = inside, inside
    for axis in range(3):
        n = any_.shape[axis] - 1
        any_ = any_.narrow(axis, 0, n) | any_.narrow(axis, 1, n)
        all_ = all_.narrow(axis, 0, n) & all_.narrow(axis, 1, n)
    return any_ & ~all_


def corners_of(cells):
    nodes = torch.zeros([n + 1 for n in cells.shape], dtype=torch.bool)
    i, j, k = cells.nonzero(as_tuple=True)
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                nodes[i + a, j + b, k + c] = True
    return nodes


@pytest.mark.parametrize("field", [sphere, shell, wavy])
@pytest.mark.parametrize("resolution", [64, 126])
def test_same_surface_as_dense(field, resolution):
    full = dense(field, resolution, 1.01, chunk=100_000)
    part = coarse_to_fine(field, resolution, 1.01, chunk=100_000)
    assert full.queries == (resolution + 1) ** 3
    cells = crossed(full.values)
    assert torch.equal(crossed(part.values), cells)
    nodes = corners_of(cells)
    assert torch.equal(part.values[nodes], full.values[nodes])
    assert torch.equal(part.values > 0, full.values > 0)


def test_twenty_times_fewer_queries():
    """A ball that fills the cube: about as much surface as objects have.

    At 384, the pipeline's own resolution, it is 34.7 times fewer; that takes 1 GB, so 256 here.
    """
    part = coarse_to_fine(sphere, 256, 1.01, chunk=500_000)
    assert part.queries * 20 <= 257**3
    inside = int((part.values > 0).sum())
    expected = 4 / 3 * torch.pi * (0.7 / 2.02 * 256) ** 3
    assert abs(inside - expected) < 2e-3 * expected


def test_a_surface_is_followed_where_the_coarse_grid_is_blind():
    """A rod thinner than a coarse cell, hit by one end: the whole of it is found."""

    def rod(points):
        ball = 0.2 - (points - torch.tensor([-0.7, 0.0, 0.0])).norm(dim=-1)
        wire = 0.006 - points[:, 1:].norm(dim=-1)
        wire = torch.minimum(wire, 0.8 - points[:, 0].abs())
        return 50 * torch.maximum(ball, wire)

    full = dense(rod, 126, 1.01, chunk=500_000)
    part = coarse_to_fine(rod, 126, 1.01, chunk=500_000)
    coarse = dense(rod, 63, 1.01, chunk=500_000)
    assert not (coarse.values[40:] > 0).any()  # the coarsest grid sees nothing of its far end
    assert (full.values[100:] > 0).any()
    assert torch.equal(part.values > 0, full.values > 0)
    assert part.queries * 7 < full.queries


def test_margin_finds_pieces_between_coarse_nodes():
    def speck(points):
        return 20 * (0.009 - points.norm(dim=-1))

    full = dense(speck, 126, 1.01, chunk=10**6)
    assert (full.values > 0).any()
    assert not (coarse_to_fine(speck, 126, 1.01, chunk=10**6).values > 0).any()
    found = coarse_to_fine(speck, 126, 1.01, margin=0.95, chunk=10**6)
    assert torch.equal(found.values > 0, full.values > 0)
    assert found.queries * 7 < full.queries


def test_level_progress_and_an_empty_field():
    seen = []
    part = coarse_to_fine(
        sphere,
        128,
        1.01,
        level=-4.0,
        chunk=50_000,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert torch.equal(part.values > -4.0, dense(sphere, 128, 1.01, chunk=10**6).values > -4.0)
    assert seen[-1] == (part.queries, part.queries)
    assert all(done <= of for done, of in seen)
    empty = coarse_to_fine(lambda p: torch.full((len(p),), -1.0), 128, 1.01, chunk=10**6)
    assert empty.queries == 65**3
    assert (empty.values == -1).all()


def test_nodes_are_in_ij_order_with_both_ends():
    grid = dense(lambda p: p[:, 0] + 10 * p[:, 1] + 100 * p[:, 2], 4, 1.0)
    assert grid.values.shape == (5, 5, 5)
    assert grid.values[0, 0, 0] == -111
    assert grid.values[4, 0, 0] == -109
    assert grid.values[0, 0, 4] == 89


@pytest.mark.parametrize("resolution", [0, 2049, 10.0, True])
def test_bad_resolutions(resolution):
    for evaluate in (dense, coarse_to_fine):
        with pytest.raises(UserError, match="grid resolution"):
            evaluate(sphere, resolution, 1.0)
