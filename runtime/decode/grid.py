"""Evaluates a logit field on the nodes of a cube: densely, or only near the surface.

    grid = coarse_to_fine(decoder.field(latents), resolution=384, bounds=1.01)
    mesh = surface_from_grid(grid.values, grid.bounds)           # vitapack.runtime.mesh

Grids have R + 1 nodes a side, both ends of [-bounds, bounds] included, 'ij' order. The reference
pipelines scale marching-cubes vertices by 2 bounds / (R + 1), not / R, which shrinks every mesh
towards the lower corner: that is `reference_scale` in `vitapack.runtime.mesh`, not decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.runtime import choices
from vitapack.runtime.progress import Control

Field = Callable[[Tensor], Tensor]  # points (P, 3) -> logits (P,)

# Grids of less than FAITHFUL cells a side lose whole legs of chairs (the reference starts at 63).
# From COARSEST up to there, cells are also split where the field only varies, by a quarter of its
# distance to the level (VARIES): a fifth of the queries of a whole grid of 96.
COARSEST, FAITHFUL, VARIES = 48, 96, 4
# A node that stands out of its neighbours' mean by this part of its distance to the level may hide
# a speck. Rounding to bfloat16 makes at most 0.008 of it.
CONTRAST = 0.05
# Points a call: on a GPU as the reference's; on a CPU what its caches hold. A point of 2mini's
# decoder takes 87 us in calls of 1000, 98 of 8000, 103 of 250 (n = 3).
CHUNKS = {"cuda": 8000, "cpu": 1000}
PART = 2**17  # new nodes looked around at a time: 60 MB


@dataclass(frozen=True)
class Grid:
    """Logits at the nodes and how many of them were asked for."""

    values: Tensor  # (R+1, R+1, R+1) float32, on the CPU
    queries: int
    bounds: float


def dense(
    field: Field,
    resolution: int,
    bounds: float,
    *,
    chunk: int | None = None,
    device: torch.device | str = "cpu",
    control: Control | None = None,
) -> Grid:
    """Every node of the grid: (R + 1)^3 queries, `chunk` of them a call (default: CHUNKS)."""
    _check(resolution, bounds)
    nodes = torch.arange((resolution + 1) ** 3, dtype=torch.int64)
    values = torch.empty(len(nodes), dtype=torch.float32)
    asker = _Asker(field, resolution, bounds, chunk, device, control or Control())
    asker(nodes, values, resolution)
    side = resolution + 1
    return Grid(values.view(side, side, side), asker.queries, bounds)


def coarse_to_fine(
    field: Field,
    resolution: int,
    bounds: float,
    *,
    level: float = 0.0,
    contrast: float = CONTRAST,
    chunk: int | None = None,
    device: torch.device | str = "cpu",
    control: Control | None = None,
) -> Grid:
    """The same surface as `dense` from a small part of its queries.

    The coarsest grid (R halved while it stays >= 48 cells) is evaluated whole. Each finer one
    starts as its interpolation; then every cell that the surface crosses has its eight nodes
    evaluated, and this is repeated until no crossed cell has an unevaluated node. So all triangles
    of the result are those of the dense grid, and every connected piece of the dense surface that
    is touched anywhere is complete. Up to 96 cells that goes for every cell whose corners are not
    much farther from the level than from each other.

    A piece between nodes that all lie on its other side (a speck, or a hole in the solid) is
    touched by none. Most raise the nodes about them a little all the same, so the cells at a node
    that stands out are evaluated too: the blobs that an extremum of a difference of Gaussians finds
    (Lowe 2004), on its smallest neighbourhood, for a `contrast` relative to the node's distance to
    the level; `math.inf` looks for none. What leaves less trace than that at the coarse nodes is
    missed, and what leaves none no rule can find.
    """
    _check(resolution, bounds)
    sizes = [resolution]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= COARSEST:
        sizes.append(sizes[-1] // 2)
    asker = _Asker(field, resolution, bounds, chunk, device, control or Control())
    size = sizes.pop()
    values = torch.empty((size + 1) ** 3, dtype=torch.float32)
    asker(torch.arange(len(values)), values, size)
    for finer in reversed(sizes):
        values = _refine(asker, values.view(size + 1, size + 1, size + 1), finer, level, contrast)
        size = finer
    return Grid(values.view(size + 1, size + 1, size + 1), asker.queries, bounds)


def _refine(asker: _Asker, coarse: Tensor, size: int, level: float, contrast: float) -> Tensor:
    """The next grid, flat, exact at every node of every cell that the surface crosses."""
    specks = _standing_out(coarse - level, contrast)
    side = size + 1
    grid = F.interpolate(
        coarse[None, None], size=(side, side, side), mode="trilinear", align_corners=True
    )[0, 0].contiguous()
    grid[::2, ::2, ::2] = coarse  # to the bit
    known = torch.zeros_like(grid, dtype=torch.bool)
    known[::2, ::2, ::2] = True
    inside = grid > level
    cells = _over_corners(inside, torch.maximum) & _over_corners(~inside, torch.maximum)
    if size <= FAITHFUL:
        halves = _varying(coarse - level)
        for axis in range(3):
            halves = halves.repeat_interleave(2, axis)
        cells |= halves
    for offset in itertools.product((-1, 0), repeat=3):
        cells[_moved(2 * specks, offset, size)] = True
    wanted = _all_corners(cells) & ~known
    values, known = grid.view(-1), known.view(-1)
    new = wanted.view(-1).nonzero()[:, 0]
    while len(new):
        asker(new, values, size)
        known[new] = True
        # A value can differ in sign from its interpolation: look at the cells around it again.
        corners = [_crossed_corners(part, values, size, level) for part in new.split(PART)]
        new = torch.cat([nodes[~known[nodes]] for nodes in corners]).unique()
    return values


def _crossed_corners(nodes: Tensor, values: Tensor, size: int, level: float) -> Tensor:
    """The corners of those cells around the nodes that the surface crosses; all indices flat."""
    side = size + 1
    i, j, k = nodes // (side * side), nodes // side % side, nodes % side
    around = []
    for di, dj, dk in itertools.product((0, 1), repeat=3):
        a, b, c = i - di, j - dj, k - dk
        whole = (a.minimum(b).minimum(c) >= 0) & (a.maximum(b).maximum(c) < size)
        around.append((((a * side) + b) * side + c)[whole])
    offsets = [(i * side + j) * side + k for i, j, k in itertools.product((0, 1), repeat=3)]
    corners = torch.cat(around).unique()[:, None] + torch.tensor(offsets)
    above = values[corners] > level
    return corners[above.any(1) & ~above.all(1)].view(-1)


def _standing_out(heights: Tensor, contrast: float) -> Tensor:
    """Indices (m, 3) of the nodes near which a piece may lie between nodes, on the other side of 0.

    They stand out of the mean of their 27-neighbourhood towards 0, by more than `contrast` times
    their distance to it, and either by more than all of it or no neighbour by more. The mean takes
    a slope away: a speck beside a large object need not be a maximum of the field.
    """
    out = heights - F.avg_pool3d(heights[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    out = out.where(heights <= 0, -out)
    found = (out > contrast * heights.abs()).nonzero()
    for offset in itertools.product((-1, 0, 1), repeat=3):
        most, near = out[found.unbind(1)], out[_moved(found, offset, len(out))]
        found = found[(near <= most) | (most > heights[found.unbind(1)].abs())]
    return found


def _moved(index: Tensor, offset: tuple[int, ...], size: int) -> tuple[Tensor, ...]:
    """Indices (m, 3) moved by an offset, inside a cube of `size` a side, as one would index it."""
    return (index + torch.tensor(offset)).clamp(0, size - 1).unbind(1)


def _varying(heights: Tensor) -> Tensor:
    """Flags (n)^3: does the surface cross the cell, or might it, as much as its corners differ?"""
    least, most = (_over_corners(heights, which) for which in (torch.minimum, torch.maximum))
    return least.maximum(-most) <= VARIES * (most - least)


def _over_corners(nodes: Tensor, both: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Values at (n+1)^3 nodes to one for each of (n)^3 cells, of all its corners."""
    for axis in range(3):
        count = nodes.shape[axis] - 1
        nodes = both(nodes.narrow(axis, 0, count), nodes.narrow(axis, 1, count))
    return nodes


def _all_corners(cells: Tensor) -> Tensor:
    """(n)^3 cell flags to (n+1)^3 node flags: the corners of flagged cells."""
    for axis in range(3):
        pad = [0] * 6
        pad[5 - 2 * axis] = 1
        after = F.pad(cells, pad)
        pad[5 - 2 * axis], pad[4 - 2 * axis] = 0, 1
        cells = after | F.pad(cells, pad)
    return cells


class _Asker:
    """Evaluates nodes by their flat index, in chunks, and counts them."""

    def __init__(
        self,
        field: Field,
        resolution: int,
        bounds: float,
        chunk: int | None,
        device: torch.device | str,
        control: Control,
    ) -> None:
        self.field, self.device, self.control = field, device, control
        self.chunk = CHUNKS[torch.device(device).type] if chunk is None else chunk
        if self.chunk < 1:
            raise ValueError(f"chunk {chunk}: expected at least 1")
        # One axis for all levels: a node has the same coordinates, to the bit, on each.
        self.axis = torch.linspace(-bounds, bounds, resolution + 1, dtype=torch.float64).float()
        self.queries = 0

    def __call__(self, nodes: Tensor, values: Tensor, size: int) -> None:
        axis = self.axis[:: (len(self.axis) - 1) // size]
        side, total = size + 1, self.queries + len(nodes)
        for part in nodes.split(self.chunk):
            self.control.check()
            index = torch.stack([part // (side * side), part // side % side, part % side], dim=1)
            values[part] = self.field(axis[index].to(self.device)).to("cpu", torch.float32)
            self.queries += len(part)
            self.control.report("decode", self.queries, total)


def refine_bytes(resolution: int) -> int:
    """Peak memory of `coarse_to_fine`: a grid's values, their interpolation and masks, 10 bytes per
    node; and the nodes around the surface of an object that fills the cube: 2000 R^2, at most
    100 MB since they are visited in chunks (measured from R = 96 to 384)."""
    return 10 * (resolution + 1) ** 3 + min(2000 * resolution**2, 100_000_000)


def _check(resolution: int, bounds: float) -> None:
    choices.resolution(resolution, "grid resolution")
    if not bounds > 0:
        raise ValueError(f"bounds {bounds}: expected a positive half side")
