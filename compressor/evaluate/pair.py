"""A reference and a candidate mesh in one frame, with lazily computed values for the metrics."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from vitapack.compressor.evaluate.alignment import Alignment, align
from vitapack.compressor.evaluate.voxels import Lattice, lattice_around, surface_voxels, voxelise
from vitapack.compressor.options import EvaluateSettings
from vitapack.kernels.emd import sample_surface
from vitapack.runtime.decode.mesh import Mesh, MeshReport, report
from vitapack.runtime.errors import UserError


class Voxels(NamedTuple):
    """Occupied voxels of a mesh, bool (X, Y, Z)."""

    surface: np.ndarray
    solid: np.ndarray


class Pair:
    """Two meshes to compare, in the frame of the reference's box, the candidate aligned to it.

    The reference's box is centred, its longest side from -1 to 1. The alignment is kept only if it
    raises S-IoU, so it never separates two meshes. Raises UserError for a mesh without
    faces or size.
    """

    def __init__(self, reference: Mesh, candidate: Mesh, settings: EvaluateSettings) -> None:
        for role, mesh in (("reference", reference), ("candidate", candidate)):
            if not len(mesh.faces) or not np.ptp(mesh.vertices[mesh.faces], axis=(0, 1)).any():
                raise UserError(
                    f"the {role} mesh has no faces, or no size; there is nothing to compare"
                )
        self.settings = settings
        self.reference, self.candidate = framed(reference, candidate)
        self.alignment = Alignment.identity()
        if settings.align != "none":
            self._align()

    def _align(self) -> None:
        alignment = align(
            self.candidate,
            self.reference,
            scale=self.settings.align == "similarity",
            seed=self.settings.seed,
        )
        moved = alignment.apply(self.candidate)
        meshes = self.candidate, moved, self.reference
        lattice = lattice_around(self.reference, self.candidate, moved, resolution=self.resolution)
        before, after, target = (surface_voxels(mesh, lattice) for mesh in meshes)
        if overlap(after, target) > overlap(before, target):
            self.candidate, self.alignment = moved, alignment

    @property
    def resolution(self) -> int:
        return self.settings.resolution

    @cached_property
    def lattice(self) -> Lattice:
        return lattice_around(self.reference, self.candidate, resolution=self.resolution)

    @cached_property
    def reference_voxels(self) -> Voxels:
        return Voxels(*voxelise(self.reference, self.lattice))

    @cached_property
    def candidate_voxels(self) -> Voxels:
        return Voxels(*voxelise(self.candidate, self.lattice))

    @cached_property
    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances to the nearest sample of the other mesh: from the reference's samples, and from
        the candidate's."""
        from scipy.spatial import cKDTree

        points = self.settings.points
        x, y = self.sample(self.reference, points, 0), self.sample(self.candidate, points, 1)
        return cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]

    @property
    def recall(self) -> float:
        """Share of the reference's samples that have one of the candidate within tau."""
        return float((self.nearest[0] <= self.settings.tau).mean())

    @property
    def precision(self) -> float:
        """Share of the candidate's samples that have one of the reference within tau."""
        return float((self.nearest[1] <= self.settings.tau).mean())

    @cached_property
    def topology(self) -> MeshReport:
        """The candidate's topology."""
        return report(self.candidate)

    def sample(self, mesh: Mesh, points: int, number: int) -> np.ndarray:
        """Surface samples (points, 3) float64. Each `number` has its own seed: with a shared one,
        equal meshes would seem closer than two triangulations of one surface."""
        seed = 3 * self.settings.seed + number
        return np.asarray(sample_surface(mesh.vertices, mesh.faces, points, seed=seed), np.float64)


def framed(reference: Mesh, candidate: Mesh) -> tuple[Mesh, Mesh]:
    """Both meshes, with the reference's box centred and its longest side from -1 to 1."""
    used = reference.vertices[np.unique(reference.faces)].astype(np.float64)
    low, high = used.min(axis=0), used.max(axis=0)
    half = (high - low).max() / 2
    frame = Alignment(np.eye(3), -(low + high) / 2 / half, 1 / half)
    return frame.apply(reference), frame.apply(candidate)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool grids (X, Y, Z); 1 for two empty grids."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0
