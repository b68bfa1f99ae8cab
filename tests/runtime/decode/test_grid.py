"""Coarse-to-fine evaluation: the dense grid's surface, from a fraction of its queries."""

import math

import pytest
import torch

from vitapack.runtime.decode import grid
from vitapack.runtime.decode.grid import coarse_to_fine, dense
from vitapack.runtime.errors import UserError
from vitapack.runtime.progress import Cancelled, Control


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
@pytest.mark.parametrize("resolution", [64, 96, 126])
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


def test_pieces_between_coarsest_nodes_are_found_where_the_field_varies(monkeypatch):
    """Balls smaller than a cell of 48 a side and larger than one of 96, in a field of distances."""
    cell = 2.02 / 48

    def balls(points):
        block = (points / (12 * cell)).floor().clamp(-2, 1)
        centre = (12 * block + 6 + (block + 2.2) / 4) * cell  # never a cell's, with equal corners
        return 30 * (0.45 * cell - (points - centre).norm(dim=1)).clamp(min=-2 * cell)

    full = dense(balls, 96, 1.01, chunk=10**6).values > 0
    part = coarse_to_fine(balls, 96, 1.01, contrast=math.inf, chunk=10**6)
    assert torch.equal(part.values > 0, full)
    assert part.queries * 2 < 97**3
    monkeypatch.setattr(grid, "VARIES", 0)
    blind = coarse_to_fine(balls, 96, 1.01, contrast=math.inf, chunk=10**6)
    assert (blind.values > 0).sum() < 0.9 * full.sum()


CELL = 2.02 / 64  # of the coarsest grid, where the finest has 128


def specks(points, sigma=0.4, wave=0.0):
    """216 bumps 9 coarse cells apart, at as many places inside a coarse cell; `sigma` in cells.

    The ground about -1.5 rises and falls by `wave`, within 16 cells.
    """
    block = (points / (9 * CELL)).floor().clamp(-3, 2)
    centre = (9 * block + 4 + (block + 3) / 6) * CELL
    bump = (-(points - centre).square().sum(1) / (2 * (sigma * CELL) ** 2)).exp()
    ground = -1.5 + wave * (points.sum(1) * (2 * torch.pi / (16 * CELL))).sin()
    return ground + 2.5 * bump


@pytest.mark.parametrize("wave", [0.0, 0.4, 0.8])
def test_specks_between_coarse_nodes_are_found(wave):
    """On level ground, and on slopes, where they are no maximum of the coarse nodes."""

    def field(points):
        return specks(points, wave=wave)

    full = dense(field, 128, 1.01, chunk=10**6).values > 0
    part = coarse_to_fine(field, 128, 1.01, chunk=10**6)
    assert torch.equal(part.values > 0, full)
    blind = coarse_to_fine(field, 128, 1.01, contrast=math.inf, chunk=10**6)
    assert (blind.values > 0).sum() < 0.7 * full.sum()
    assert part.queries < 1.7 * blind.queries


def test_holes_in_the_solid_are_found():
    def solid(points):
        return torch.minimum(-specks(points), 40 * (0.97 - points.abs().amax(1)))

    full = dense(solid, 128, 1.01, chunk=10**6).values > 0
    part = coarse_to_fine(solid, 128, 1.01, chunk=10**6)
    assert torch.equal(part.values > 0, full)
    blind = coarse_to_fine(solid, 128, 1.01, contrast=math.inf, chunk=10**6)
    assert ((blind.values > 0) & ~full).sum() > 300


@pytest.mark.parametrize("offset", [0.5, 0.3])
@pytest.mark.parametrize("tilt", [0.0, 0.004, 0.3])
def test_sheets_between_layers_of_coarse_nodes_are_found(tilt, offset):
    """A disc thinner than a coarse cell, between two layers of nodes or across many."""

    def disc(points):
        x, y, z = points.unbind(1)
        z = math.cos(tilt) * (z - offset * CELL) + math.sin(tilt) * x
        distance = ((x.square() + y.square()).sqrt() - 0.5).clamp(min=0).square() + z.square()
        return 1.4 * (-distance / (2 * (0.3 * CELL) ** 2)).exp() - 1

    full = dense(disc, 128, 1.01, chunk=10**6).values > 0
    assert full.sum() > 700
    part = coarse_to_fine(disc, 128, 1.01, chunk=10**6)
    assert torch.equal(part.values > 0, full)
    if tilt == 0:
        blind = coarse_to_fine(disc, 128, 1.01, contrast=math.inf, chunk=10**6)
        assert not (blind.values > 0).any()


def test_what_leaves_no_trace_at_the_nodes_is_missed():
    def speck(points):
        return torch.where((points - CELL / 2).norm(dim=-1) < 0.6 * CELL, 1.0, -1.0)

    assert (dense(speck, 128, 1.01, chunk=10**6).values > 0).any()
    part = coarse_to_fine(speck, 128, 1.01, chunk=10**6)
    assert part.queries == 65**3
    assert (part.values == -1).all()


def test_rounding_to_bfloat16_is_no_speck():
    def rounded(points):
        return (-8 - points.norm(dim=-1)).bfloat16().float()

    assert coarse_to_fine(rounded, 128, 1.01, chunk=10**6).queries == 65**3


def test_level_progress_and_an_empty_field():
    seen = []
    part = coarse_to_fine(
        sphere,
        128,
        1.01,
        level=-4.0,
        chunk=50_000,
        control=Control(lambda at: seen.append((at.done, at.total))),
    )
    assert torch.equal(part.values > -4.0, dense(sphere, 128, 1.01, chunk=10**6).values > -4.0)
    assert seen[-1] == (part.queries, part.queries)
    assert all(done <= of for done, of in seen)
    control = Control(lambda at: at.done >= 100_000 and control.cancel())
    with pytest.raises(Cancelled):
        coarse_to_fine(sphere, 128, 1.01, chunk=50_000, control=control)
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
