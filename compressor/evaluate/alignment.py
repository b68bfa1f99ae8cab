"""Rigid alignment of two meshes: rotation and translation, optionally one scale.

    moved = align(candidate, reference).apply(candidate)

Models agree neither on the front nor on the centre of a shape, so overlap is measured after
alignment (the paper's appendix mentions it for V-IoU and S-IoU, without details). Mirror images are
not tried. The same pair gives the same result.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np

from vitapack.runtime.decode.mesh import Mesh

_FIRST, _SECOND = 300, 1000  # points in the two coarse stages
_KEPT = 8  # poses that reach the second stage
_FINAL = 3  # poses that reach the last stage


@dataclass(frozen=True, eq=False)
class Alignment:
    """x -> scale * rotation @ x + translation."""

    rotation: np.ndarray  # (3, 3) float64, determinant 1
    translation: np.ndarray  # (3,) float64
    scale: float = 1.0

    @classmethod
    def identity(cls) -> Alignment:
        return cls(np.eye(3), np.zeros(3))

    def points(self, points: np.ndarray) -> np.ndarray:
        return self.scale * points @ self.rotation.T + self.translation

    def back(self, points: np.ndarray) -> np.ndarray:
        return (points - self.translation) @ self.rotation / self.scale

    def apply(self, mesh: Mesh) -> Mesh:
        return replace(mesh, vertices=self.points(mesh.vertices.astype(np.float64)))

    @property
    def degrees(self) -> float:
        """The angle of the rotation, in degrees."""
        return float(np.degrees(np.arccos(np.clip((np.trace(self.rotation) - 1) / 2, -1, 1))))


def align(
    moving: Mesh, fixed: Mesh, *, scale: bool = False, points: int = 4000, seed: int = 0
) -> Alignment:
    """Finds the motion that brings `moving` onto `fixed`.

    ICP in both directions at once (each point of either mesh is paired with the nearest of the
    other) from 97 poses: the given one, and with coinciding centroids the cube's 24 rotations and
    these turned 45 degrees about each axis. The best poses continue with more points
    and finally with point-to-plane steps. Poses are ranked by the mean squared nearest-neighbour
    distance, summed over both directions; within 1 % of the best, the given pose's result is kept.
    """
    from vitapack.kernels.emd.solve import sample_surface

    x = np.asarray(
        sample_surface(moving.vertices, moving.faces, points, seed=seed), dtype=np.float64
    )
    y = np.asarray(sample_surface(fixed.vertices, fixed.faces, points, seed=seed), dtype=np.float64)
    poses = _starts(x, y, scale)
    coarse, middle, fine = (
        _Pair(x[:: max(1, points // n)], y[:: max(1, points // n)], scale)
        for n in (_FIRST, _SECOND, points)
    )
    # The given pose (the first) always continues: it is right more often than any other.
    order = np.argsort([coarse.error(pose) for pose in poses], kind="stable").tolist()
    chosen = [0, *[number for number in order if number != 0][: _KEPT - 1]]
    poses = [middle.improve(poses[number], 15) for number in chosen]
    order = np.argsort([middle.error(pose) for pose in poses], kind="stable").tolist()
    chosen = [0, *[number for number in order if number != 0][: _FINAL - 1]]
    poses = [fine.slide(fine.improve(poses[number], 30)) for number in chosen]
    errors = [fine.error(pose) for pose in poses]
    best = int(np.argmin(errors))
    return poses[0] if errors[0] <= 1.01 * errors[best] else poses[best]


def _starts(x: np.ndarray, y: np.ndarray, scale: bool) -> list[Alignment]:
    from scipy.spatial.transform import Rotation

    middle_x, middle_y = x.mean(axis=0), y.mean(axis=0)
    size = 1.0
    if scale:
        size = float(
            np.sqrt(((y - middle_y) ** 2).sum() / max(((x - middle_x) ** 2).sum(), 1e-300))
        )
    cube = Rotation.create_group("O").as_matrix()
    eighth = Rotation.from_rotvec(np.pi / 4 * np.eye(3)).as_matrix()
    turns = [np.eye(3), *cube, *(half @ turn for half, turn in itertools.product(eighth, cube))]
    starts = [Alignment(turn, middle_y - size * turn @ middle_x, size) for turn in turns]
    return [Alignment.identity(), *starts]


class _Pair:
    """Two point clouds with their search trees."""

    def __init__(self, x: np.ndarray, y: np.ndarray, scale: bool) -> None:
        from scipy.spatial import cKDTree

        self.x, self.y, self.scale = x, y, scale
        self.tree_x, self.tree_y = cKDTree(x), cKDTree(y)

    def nearest(self, pose: Alignment) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Distances and indices from moved x to y, and from y to moved x."""
        there, at_y = self.tree_y.query(pose.points(self.x))
        back, at_x = self.tree_x.query(pose.back(self.y))
        return there, at_y, back * pose.scale, at_x

    @functools.cached_property
    def normals(self) -> tuple[np.ndarray, np.ndarray]:
        return _normals(self.x, self.tree_x), _normals(self.y, self.tree_y)

    def error(self, pose: Alignment) -> float:
        there, _, back, _ = self.nearest(pose)
        return float((there**2).mean() + (back**2).mean())

    def improve(self, pose: Alignment, steps: int) -> Alignment:
        """Point-to-point ICP until a step improves the error by less than 0.1 %."""
        before = np.inf
        for _ in range(steps):
            there, at_y, back, at_x = self.nearest(pose)
            error = float((there**2).mean() + (back**2).mean())
            if error >= before * 0.999:
                break
            before = error
            pose = _fit(
                np.concatenate([self.x, self.x[at_x]]),
                np.concatenate([self.y[at_y], self.y]),
                self.scale,
            )
        return pose

    def slide(self, pose: Alignment, steps: int = 12) -> Alignment:
        """Point-to-plane ICP: samples can slide along flat regions, unlike with point-to-point.

        Pairs over three times as far apart as the median are ignored. The result is discarded if
        the error grows by over 5 % (points on edges and wires have no plane).
        """
        from scipy.spatial.transform import Rotation

        start = pose
        normal_x, normal_y = self.normals
        for _ in range(steps):
            there, at_y, back, at_x = self.nearest(pose)
            moved = pose.points(np.concatenate([self.x, self.x[at_x]]))
            target = np.concatenate([self.y[at_y], self.y])
            normal = np.concatenate([normal_y[at_y], normal_x[at_x] @ pose.rotation.T])
            apart = np.concatenate([there, back])
            near = apart <= 3 * np.median(apart)
            middle = moved[near].mean(axis=0)
            arm, normal = moved[near] - middle, normal[near]
            columns = [np.cross(arm, normal), normal]
            if self.scale:
                columns.append((arm * normal).sum(axis=1, keepdims=True))
            gap = ((target[near] - moved[near]) * normal).sum(axis=1)
            change = np.linalg.lstsq(np.hstack(columns), gap, rcond=1e-6)[0]
            turn = Rotation.from_rotvec(change[:3]).as_matrix()
            grow = 1 + float(np.clip(change[6], -0.2, 0.2)) if self.scale else 1.0
            pose = Alignment(
                turn @ pose.rotation,
                grow * turn @ (pose.translation - middle) + middle + change[3:6],
                grow * pose.scale,
            )
            if np.abs(change).max() < 1e-6:
                break
        return pose if self.error(pose) <= 1.05 * self.error(start) else start


def _fit(x: np.ndarray, y: np.ndarray, scale: bool) -> Alignment:
    """Least-squares motion of paired points (Umeyama 1991), without mirror images."""
    middle_x, middle_y = x.mean(axis=0), y.mean(axis=0)
    u, size, vt = np.linalg.svd((y - middle_y).T @ (x - middle_x))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt)) or 1.0])
    rotation = (u * sign) @ vt
    factor = 1.0
    if scale:
        factor = max(float((size * sign).sum() / max(((x - middle_x) ** 2).sum(), 1e-300)), 1e-6)
    return Alignment(rotation, middle_y - factor * rotation @ middle_x, factor)


def _normals(points: np.ndarray, tree: object) -> np.ndarray:
    """The direction of least spread among each point's 8 nearest, (N, 3)."""
    _, near = tree.query(points, k=min(9, len(points)))  # type: ignore[attr-defined]
    group = points[near.reshape(len(points), -1)]
    group = group - group.mean(axis=1, keepdims=True)
    return np.linalg.eigh(np.einsum("nki,nkj->nij", group, group))[1][:, :, 0]
