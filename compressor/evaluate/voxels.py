"""Voxelises meshes: surface and solid of any mesh, closed or not, on one lattice.

    lattice = lattice_around(reference, candidate, resolution=64)
    surface, solid = voxelise(candidate, lattice)

The surface is the set of voxels that the mesh passes through. The solid is the surface and all
voxels that a flood from outside cannot reach: parity and winding numbers fail on the open,
overlapping and inside-out pieces common in artists' meshes, a flood does not. The solid is half a
voxel thicker on every side, equally for both meshes of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vitapack.runtime.decode.mesh import Mesh, report

_MARGIN = 3  # empty voxels around everything, so that the outside is connected
_LONGEST = 400  # voxels per side at most: 64 million in all, for which the flood needs 320 MB
# With samples 0.4 voxel apart no point of the surface is farther than 0.45 from a sample. If the
# surface cuts the line between the centres of two face neighbours, one of the two is then marked
# (any other voxel is 0.5 away), so a 6-connected flood cannot pass.
_SPACING = 0.4
_CHUNK = 1 << 21  # points processed at a time: 150 MB


@dataclass(frozen=True)
class Lattice:
    """Voxel (i, j, k) is the cube of side `pitch` from origin + pitch (i, j, k)."""

    origin: tuple[float, float, float]
    pitch: float
    shape: tuple[int, int, int]


def lattice_around(reference: Mesh, *others: Mesh, resolution: int = 64) -> Lattice:
    """A lattice with `resolution` voxels along the longest side of the reference's box.

    The first and the last voxel are centred on the box's faces: flat sides on voxel boundaries
    would jump a whole voxel at the slightest change. The lattice also covers the other meshes, up
    to 400 voxels per side. If one reaches farther, the lattice ends at half the box's longest side
    from the box, and geometry outside is ignored.
    """
    if resolution < 2:
        raise ValueError(f"resolution {resolution}; expected at least 2 voxels")
    low, high = _box(reference)
    pitch = float((high - low).max()) / (resolution - 1)
    if pitch <= 0:
        raise ValueError("the reference mesh is a single point; it has no size to divide")
    boxes = [_box(mesh) for mesh in others] + [(low, high)]
    least = np.min([box[0] for box in boxes], axis=0)
    most = np.max([box[1] for box in boxes], axis=0)
    if (most - least).max() > max(_LONGEST, 2 * resolution) * pitch:
        room = (high - low).max() / 2
        least, most = np.maximum(least, low - room), np.minimum(most, high + room)
    before = np.ceil((low - least) / pitch).astype(int) + _MARGIN
    after = np.ceil((most - low) / pitch).astype(int) + 1 + _MARGIN
    origin = low - (before + 0.5) * pitch
    x, y, z = (before + after).tolist()
    return Lattice((float(origin[0]), float(origin[1]), float(origin[2])), pitch, (x, y, z))


def voxelise(mesh: Mesh, lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
    """Surface and solid, bool arrays of the lattice's shape.

    In a mesh that is not watertight, gaps of up to 2 voxels are sealed before the flood by dilating
    the surface by one voxel, and the solid is eroded again; wider openings stay open.
    """
    surface = surface_voxels(mesh, lattice)
    if report(mesh).watertight:
        return surface, ~_outside(surface)
    # Open sheets stay in the solid: it always contains the surface.
    return surface, ~dilate(_outside(dilate(surface))) | surface


def surface_voxels(mesh: Mesh, lattice: Lattice) -> np.ndarray:
    """The voxels that the surface passes through, from samples 0.4 voxel apart on each triangle."""
    grid = np.zeros(lattice.shape, dtype=bool)
    corner = (mesh.vertices.astype(np.float64) - lattice.origin)[mesh.faces] / lattice.pitch
    corner = _in_reach(corner, np.array(lattice.shape, dtype=np.float64))
    # The longest edge becomes the base, so rows parallel to it get shorter monotonically.
    length = np.linalg.norm(np.roll(corner, -1, axis=1) - corner, axis=2)
    turn = (length.argmax(axis=1)[:, None] + np.arange(3)) % 3
    a, b, c = np.take_along_axis(corner, turn[:, :, None], axis=1).transpose(1, 0, 2)
    base = length.max(axis=1)
    height = np.linalg.norm(np.cross(b - a, c - a), axis=1) / np.maximum(base, 1e-12)
    rows = np.ceil(height / _SPACING).astype(np.int64) + 1
    face, row = _ragged(rows)
    share = row / np.maximum(rows[face] - 1, 1)  # 0 on the base, 1 at the opposite corner
    points = np.ceil(base[face] * (1 - share) / _SPACING).astype(np.int64) + 1
    splits = np.searchsorted(np.cumsum(points), np.arange(_CHUNK, int(points.sum()), _CHUNK))
    for rows in np.split(np.arange(len(points)), np.unique(splits)):
        line, step = _ragged(points[rows])
        along = step / np.maximum(points[rows][line] - 1, 1)
        f, up = face[rows][line], share[rows][line]
        left = (1 - along) * (1 - up)
        place = left[:, None] * a[f] + (along * (1 - up))[:, None] * b[f] + up[:, None] * c[f]
        voxel = np.floor(place).astype(np.int64)
        inside = ((voxel >= 0) & (voxel < lattice.shape)).all(axis=1)
        grid[tuple(voxel[inside].T)] = True
    return grid


def _in_reach(corner: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Drops triangles (F, 3, 3), in voxels, outside 0..shape and cuts huge ones into four.

    A mesh may be a thousand times the lattice's size; sampling all of it would never finish.
    """
    done = []
    while len(corner):
        near = ((corner.max(axis=1) >= 0) & (corner.min(axis=1) <= shape)).all(axis=1)
        corner = corner[near]
        huge = np.ptp(corner, axis=1).max(axis=1) > 2 * shape.max()
        done.append(corner[~huge])
        a, b, c = corner[huge].transpose(1, 0, 2)
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        parts = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
        corner = np.concatenate([np.stack(part, axis=1) for part in parts])
    return np.concatenate(done) if done else corner


def dilate(grid: np.ndarray) -> np.ndarray:
    """Adds the 26 neighbours of its voxels to a bool grid (..., X, Y, Z), numpy or torch."""
    for axis in (-3, -2, -1):
        ahead: list[Any] = [slice(None)] * 3
        behind: list[Any] = [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        wider = grid | grid  # a copy, in both libraries
        wider[(..., *ahead)] |= grid[(..., *behind)]
        wider[(..., *behind)] |= grid[(..., *ahead)]
        grid = wider
    return grid


def _outside(wall: np.ndarray) -> np.ndarray:
    """The voxels that a 6-connected flood from the whole border of the lattice reaches."""
    from scipy.ndimage import label

    pieces, count = label(~wall)
    border = np.zeros(count + 1, dtype=bool)
    for axis in range(3):
        border[pieces.take((0, -1), axis=axis)] = True
    border[0] = False  # the wall itself
    return border[pieces]


def _box(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    points = mesh.vertices[np.unique(mesh.faces)].astype(np.float64)
    return points.min(axis=0), points.max(axis=0)


def _ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index i repeated `counts[i]` times, and the positions 0, 1, 2, ... within each i."""
    item = np.repeat(np.arange(len(counts)), counts)
    return item, np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)
