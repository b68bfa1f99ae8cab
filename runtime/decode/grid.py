"""Evaluates a logit field on the nodes of a cube: densely, or only near the surface.

    grid = coarse_to_fine(decoder.field(latents), resolution=384, bounds=1.01)
    mesh = surface_from_grid(grid.values, grid.bounds)           # vitapack.runtime.mesh

Grids have R + 1 nodes per side, both ends of [-bounds, bounds] included, 'ij' order. The reference
pipelines scale marching-cubes vertices by 2 bounds / (R + 1), not / R, which shrinks every mesh
towards the lower corner: see `reference_scale` in `vitapack.runtime.mesh`.
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

# Grids below FAITHFUL cells per side lose whole legs of chairs (the reference starts at 63). From
# COARSEST to FAITHFUL a cell is therefore also refined if the field varies across it by a quarter
# (1 / VARIES) of its distance to the level: a fifth of the queries of a dense grid of 96.
COARSEST, FAITHFUL, VARIES = 48, 96, 4
# A node that deviates from its neighbours' mean by this fraction of its distance to the level may
# hide a small component. Rounding to bfloat16 causes deviations of at most 0.008 of it.
CONTRAST = 0.05
# Query points per call: on a GPU as in the reference implementation; on a CPU as many as fit its
# caches. 2mini's decoder takes 87 us per point in calls of 1000, 98 of 8000, 103 of 250 (n = 3).
CHUNKS = {"cuda": 8000, "cpu": 1000}
REFINE_CHUNK = 2**17  # new nodes whose neighbours are visited at a time: 60 MB


@dataclass(frozen=True)
class Grid:
    """Logits at the nodes, and the number of query points evaluated for them."""

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
    """Evaluates every node: (R + 1)^3 queries, `chunk` of them per call (default: CHUNKS)."""
    _check(resolution, bounds)
    nodes = torch.arange((resolution + 1) ** 3, dtype=torch.int64)
    values = torch.empty(len(nodes), dtype=torch.float32)
    evaluate = _Evaluator(field, resolution, bounds, chunk, device, control or Control())
    evaluate(nodes, values, resolution)
    side = resolution + 1
    return Grid(values.view(side, side, side), evaluate.queries, bounds)


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
    """Finds the surface of `dense` with a small fraction of its queries.

    The coarsest grid (R halved while it stays >= 48 cells) is evaluated at every node. Each finer
    grid starts as its interpolation; then the eight nodes of every cell that the surface crosses
    are evaluated, repeatedly, until no crossed cell has an unevaluated node. So all triangles of
    the result are those of the dense grid, and every connected component of the dense surface is
    complete once one of its cells is evaluated. Up to 96 cells per side, cells whose corner values
    differ by much, relative to their distance to the level, are evaluated too.

    A component (or a void in the solid) so small that it lies between nodes changes the sign of
    none of them. Most still shift the values of nearby nodes, so the cells at outlier nodes are
    evaluated too, by the rule for extrema of a difference of Gaussians (Lowe 2004) on its smallest
    neighbourhood, with a `contrast` relative to the node's distance to the level; `math.inf` turns
    this off. Components with less effect on the coarse nodes are missed; those with no effect
    cannot be found by any rule.
    """
    _check(resolution, bounds)
    sizes = [resolution]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= COARSEST:
        sizes.append(sizes[-1] // 2)
    evaluate = _Evaluator(field, resolution, bounds, chunk, device, control or Control())
    size = sizes.pop()
    values = torch.empty((size + 1) ** 3, dtype=torch.float32)
    evaluate(torch.arange(len(values)), values, size)
    for finer in reversed(sizes):
        values = _refine(
            evaluate, values.view(size + 1, size + 1, size + 1), finer, level, contrast
        )
        size = finer
    return Grid(values.view(size + 1, size + 1, size + 1), evaluate.queries, bounds)


def _refine(
    evaluate: _Evaluator, coarse: Tensor, size: int, level: float, contrast: float
) -> Tensor:
    """The next grid, flat, evaluated at every node of every cell that the surface crosses."""
    specks = _outliers(coarse - level, contrast)
    side = size + 1
    grid = F.interpolate(
        coarse[None, None], size=(side, side, side), mode="trilinear", align_corners=True
    )[0, 0].contiguous()
    grid[::2, ::2, ::2] = coarse  # exact to the bit
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
        evaluate(new, values, size)
        known[new] = True
        # A value can differ in sign from its interpolation: check the cells around it again.
        corners = [
            _crossed_corners(chunk, values, size, level) for chunk in new.split(REFINE_CHUNK)
        ]
        new = torch.cat([nodes[~known[nodes]] for nodes in corners]).unique()
    return values


def _crossed_corners(nodes: Tensor, values: Tensor, size: int, level: float) -> Tensor:
    """Corners of the cells next to `nodes` that the surface crosses; all indices are flat."""
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


def _outliers(heights: Tensor, contrast: float) -> Tensor:
    """Indices (m, 3) of the nodes near which a small component may lie between nodes.

    Such a node deviates from the mean of its 27-neighbourhood towards 0 by more than `contrast`
    times its distance to 0, and either by more than that whole distance, or by at least as much as
    each neighbour. Subtracting the mean removes slopes: a small component next to a large object
    need not be a maximum of the field.
    """
    out = heights - F.avg_pool3d(heights[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    out = out.where(heights <= 0, -out)
    nodes = (out > contrast * heights.abs()).nonzero()
    for offset in itertools.product((-1, 0, 1), repeat=3):
        own, near = out[nodes.unbind(1)], out[_moved(nodes, offset, len(out))]
        nodes = nodes[(near <= own) | (own > heights[nodes.unbind(1)].abs())]
    return nodes


def _moved(index: Tensor, offset: tuple[int, ...], size: int) -> tuple[Tensor, ...]:
    """Index arrays of (m, 3) indices moved by an offset, clamped to a cube of `size` per side."""
    return (index + torch.tensor(offset)).clamp(0, size - 1).unbind(1)


def _varying(heights: Tensor) -> Tensor:
    """Flags (n)^3: does the surface cross the cell, or might it, as much as its corners differ?"""
    least, most = (_over_corners(heights, which) for which in (torch.minimum, torch.maximum))
    return least.maximum(-most) <= VARIES * (most - least)


def _over_corners(nodes: Tensor, both: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Reduces values at (n+1)^3 nodes over the eight corners of each of n^3 cells by `both`."""
    for axis in range(3):
        count = nodes.shape[axis] - 1
        nodes = both(nodes.narrow(axis, 0, count), nodes.narrow(axis, 1, count))
    return nodes


def _all_corners(cells: Tensor) -> Tensor:
    """Turns n^3 cell flags into (n+1)^3 node flags: the corners of flagged cells."""
    for axis in range(3):
        pad = [0] * 6
        pad[5 - 2 * axis] = 1
        after = F.pad(cells, pad)
        pad[5 - 2 * axis], pad[4 - 2 * axis] = 0, 1
        cells = after | F.pad(cells, pad)
    return cells


class _Evaluator:
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
        for flat in nodes.split(self.chunk):
            self.control.check()
            index = torch.stack([flat // (side * side), flat // side % side, flat % side], dim=1)
            values[flat] = self.field(axis[index].to(self.device)).to("cpu", torch.float32)
            self.queries += len(flat)
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
