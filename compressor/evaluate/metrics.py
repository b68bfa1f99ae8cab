"""How alike two meshes are: overlap, distances, watertightness, for pairs and for whole folders.

    result = evaluate_folders("originals", "compressed")
    print(describe(result))

Meshes of any origin can be compared: a pair is brought to one frame first (the reference's box
centred, its longest side from -1 to 1, the candidate moved along), then aligned. `METRICS` says
what each number means; distances are in units of that frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitapack.compressor.evaluate.alignment import Alignment, align
from vitapack.compressor.evaluate.statistics import mean_interval
from vitapack.compressor.evaluate.voxels import dilate, lattice_around, surface_voxels, voxelise
from vitapack.compressor.options import EvaluateSettings
from vitapack.runtime.decode.mesh import READABLE, Mesh, load, report
from vitapack.runtime.errors import UserError
from vitapack.runtime.progress import Control


@dataclass(frozen=True)
class Metric:
    """One number of a comparison."""

    label: str
    higher_is_better: bool
    definition: str


METRICS = {
    "v_iou": Metric(
        "V-IoU",
        True,
        "Volume overlap: voxels in both solids over voxels in either. Solid: every voxel that the "
        "surface passes through or that a flood from outside cannot reach (6-connected; gaps of "
        "meshes that are not watertight are sealed up to 2 voxels). The reference's longest side "
        "has as many voxels as the stated resolution.",
    ),
    "s_iou": Metric(
        "S-IoU",
        True,
        "Surface overlap: voxels that both surfaces pass through over voxels that either passes "
        "through, on the same lattice.",
    ),
    "v_iou_tolerant": Metric(
        "V-IoU, 1 voxel",
        True,
        "Volume overlap in which a voxel also counts as shared when one of its 26 neighbours lies "
        "in the other solid: m / (m + misses of both), m the mean number of matches of the two.",
    ),
    "chamfer": Metric(
        "Chamfer",
        False,
        "Mean distance from a sample of one surface to the nearest sample of the other, averaged "
        "over both directions.",
    ),
    "chamfer_squared": Metric(
        "Chamfer²",
        False,
        "Mean squared distance to the nearest sample, summed over both directions: the paper's CD.",
    ),
    "emd": Metric(
        "EMD",
        False,
        "Earth mover's distance: mean distance under the best one-to-one pairing of the samples of "
        "both surfaces. It never falls below the floor beside it.",
    ),
    "emd_floor": Metric(
        "EMD floor",
        False,
        "The same between two independent samples of the reference: what no difference looks like.",
    ),
    "f_score": Metric(
        "F-score",
        True,
        "Harmonic mean of precision and recall: the shares of the candidate's and the reference's "
        "samples that have a sample of the other within tau.",
    ),
    "watertight": Metric("watertight", True, "Share of candidates whose every edge has two faces."),
}


def grid_iou(a: Any, b: Any, level: float = 0.0) -> Any:
    """Intersection over union of two occupancy grids (..., X, Y, Z), numpy or torch.

    Bool grids as they are; others are occupied where above `level`. Two empty grids are equal: 1.
    A float for three axes; with more in front, a float64 array of their shape.
    """
    a, b = _occupied(a, level), _occupied(b, level)
    _same_shape(a, b)
    return _ratio(_count(a & b), _count(a | b))


def grid_iou_tolerant(a: Any, b: Any, level: float = 0.0) -> Any:
    """`grid_iou` where a voxel also matches one of the 26 around its place in the other grid.

    m / (m + misses): m is the mean of both grids' matched voxels, misses the sum of both grids'
    unmatched ones. Without the neighbours this is the strict IoU.
    """
    a, b = _occupied(a, level), _occupied(b, level)
    _same_shape(a, b)
    in_a, in_b = _count(a & dilate(b)), _count(b & dilate(a))
    matched = (in_a + in_b) / 2
    return _ratio(matched, matched + (_count(a) - in_a) + (_count(b) - in_b))


def _occupied(grid: Any, level: float) -> Any:
    if not hasattr(grid, "detach"):  # not a tensor
        grid = np.asarray(grid)
    is_bool = str(grid.dtype).endswith("bool")
    if grid.ndim < 3:
        raise ValueError(f"grid of shape {tuple(grid.shape)}; expected (..., X, Y, Z)")
    return grid if is_bool else grid > level


def _same_shape(a: Any, b: Any) -> None:
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"grids of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected equal")


def _count(grid: Any) -> np.ndarray:
    total = grid.sum((-3, -2, -1))
    return np.asarray(total.cpu() if hasattr(total, "cpu") else total, dtype=np.float64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> Any:
    share = np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)
    return float(share) if share.ndim == 0 else share


def compare(
    reference: Mesh, candidate: Mesh, settings: EvaluateSettings | None = None
) -> dict[str, Any]:
    """Every metric of one pair, with the alignment used and both meshes' topology, for JSON.

    The alignment found is kept only if it makes S-IoU greater than no alignment does, so that it
    can never be what separates two meshes. Raises UserError for a mesh without faces or size.
    """
    settings = settings or EvaluateSettings()
    for role, mesh in (("reference", reference), ("candidate", candidate)):
        if not len(mesh.faces) or not np.ptp(mesh.vertices[mesh.faces], axis=(0, 1)).any():
            raise UserError(
                f"the {role} mesh has no faces, or no size; there is nothing to compare"
            )
    reference, candidate = _framed(reference, candidate)
    found = Alignment.identity()
    if settings.align != "none":
        found = align(
            candidate, reference, scale=settings.align == "similarity", seed=settings.seed
        )
        moved = found.apply(candidate)
        lattice = lattice_around(reference, candidate, moved, resolution=settings.resolution)
        still, after, there = (
            surface_voxels(mesh, lattice) for mesh in (candidate, moved, reference)
        )
        if grid_iou(after, there) > grid_iou(still, there):
            candidate = moved
        else:
            found = Alignment.identity()
    row: dict[str, Any] = _overlap(reference, candidate, settings)
    row.update(_distances(reference, candidate, settings))
    topology = report(candidate)
    row["watertight"] = topology.watertight
    row["alignment"] = {
        "degrees": found.degrees,
        "shift": float(np.linalg.norm(found.translation)),
        "scale": found.scale,
    }
    row["candidate"] = dataclasses.asdict(topology)
    row["reference"] = dataclasses.asdict(report(reference))
    return row


def _framed(reference: Mesh, candidate: Mesh) -> tuple[Mesh, Mesh]:
    """Both meshes moved and scaled as brings the reference's box to [-1, 1] on its longest side."""
    used = reference.vertices[np.unique(reference.faces)].astype(np.float64)
    low, high = used.min(axis=0), used.max(axis=0)
    half = (high - low).max() / 2
    frame = Alignment(np.eye(3), -(low + high) / 2 / half, 1 / half)
    return frame.apply(reference), frame.apply(candidate)


def _overlap(reference: Mesh, candidate: Mesh, settings: EvaluateSettings) -> dict[str, float]:
    lattice = lattice_around(reference, candidate, resolution=settings.resolution)
    surface_r, solid_r = voxelise(reference, lattice)
    surface_c, solid_c = voxelise(candidate, lattice)
    return {
        "v_iou": grid_iou(solid_r, solid_c),
        "s_iou": grid_iou(surface_r, surface_c),
        "v_iou_tolerant": grid_iou_tolerant(solid_r, solid_c),
    }


def _distances(reference: Mesh, candidate: Mesh, settings: EvaluateSettings) -> dict[str, float]:
    from scipy.spatial import cKDTree

    from vitapack.kernels.emd.solve import emd, sample_surface

    def sample(mesh: Mesh, number: int, seed: int) -> np.ndarray:
        # Every sample its own seed: shared ones would make equal meshes look closer than they are
        # to a mesh of the same surface with other triangles.
        cloud = sample_surface(mesh.vertices, mesh.faces, number, seed=3 * settings.seed + seed)
        return np.asarray(cloud, dtype=np.float64)

    x, y = sample(reference, settings.points, 0), sample(candidate, settings.points, 1)
    missed, strayed = cKDTree(y).query(x)[0], cKDTree(x).query(y)[0]
    recall, precision = (
        float((missed <= settings.tau).mean()),
        float((strayed <= settings.tau).mean()),
    )
    row = {
        "chamfer": float(missed.mean() + strayed.mean()) / 2,
        "chamfer_squared": float((missed**2).mean() + (strayed**2).mean()),
        "f_score": 2 * precision * recall / max(precision + recall, 1e-12),
        "precision": precision,
        "recall": recall,
    }
    if settings.emd_points:
        x = sample(reference, settings.emd_points, 0)
        row["emd"] = float(emd(x, sample(candidate, settings.emd_points, 1)).distance)
        row["emd_floor"] = float(emd(x, sample(reference, settings.emd_points, 2)).distance)
    return row


def summarise(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean, median and the mean's 95 % bootstrap interval of every metric over rows of `compare`.

    Percentile bootstrap over objects with 2,000 resamples; one object gives an interval of no width
    and says nothing about others.
    """
    draws = np.random.default_rng(seed)
    summary = {}
    for name in METRICS:
        values = np.array([row[name] for row in rows if row.get(name) is not None], np.float64)
        if not len(values):
            continue
        low, high = mean_interval(values, draws)
        summary[name] = {
            "mean": float(values.mean()),
            "median": float(np.median(values)),
            "low": low,
            "high": high,
            "n": len(values),
        }
    return summary


def evaluate_folders(
    reference_dir: str | Path,
    candidate_dir: str | Path,
    settings: EvaluateSettings | None = None,
    *,
    control: Control | None = None,
) -> dict[str, Any]:
    """Compares the meshes of two folders that have the same name, whatever their formats.

    Returns a dict for JSON: "settings", "definitions", "pairs" (rows of `compare` with "name" and
    both files), "summary" (as `summarise`), "only_in_reference" and "only_in_candidate".
    `control` reports the "pairs" and can cancel between them.

    Raises UserError for a folder that is missing or has no meshes, two meshes of one name in a
    folder, no common names, and for a mesh that cannot be read (naming the file).
    """
    settings = settings or EvaluateSettings()
    control = control or Control()
    references, candidates = _meshes_in(reference_dir), _meshes_in(candidate_dir)
    names = sorted(references.keys() & candidates.keys())
    if not names:
        raise UserError(
            f"{reference_dir} and {candidate_dir} have no mesh of the same name "
            f"({_some(references)} against {_some(candidates)}); name pairs alike"
        )
    rows = []
    for number, name in enumerate(names):
        control.step("pairs", number, len(names))
        files = {"reference_file": str(references[name]), "candidate_file": str(candidates[name])}
        try:
            row = compare(load(references[name]), load(candidates[name]), settings)
        except UserError as error:
            where = (
                ""
                if str(references[name].parent) in str(error)
                or str(candidates[name].parent) in str(error)
                else f"{references[name]} and {candidates[name]}: "
            )
            raise UserError(f"{where}{error}") from error
        rows.append({"name": name, **files, **row})
    control.report("pairs", len(names), len(names))
    return {
        "settings": dataclasses.asdict(settings),
        "definitions": {name: metric.definition for name, metric in METRICS.items()},
        "summary": summarise(rows, settings.seed),
        "pairs": rows,
        "only_in_reference": sorted(references.keys() - candidates.keys()),
        "only_in_candidate": sorted(candidates.keys() - references.keys()),
    }


def _meshes_in(folder: str | Path) -> dict[str, Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of meshes")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in READABLE or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise UserError(
                f"{folder} has two meshes called {path.stem!r} ({found[path.stem].name} and "
                f"{path.name}); keep one"
            )
        found[path.stem] = path
    if not found:
        raise UserError(f"{folder}: has no meshes; expected {', '.join(READABLE)} files")
    return found


def _some(names: Mapping[str, Path]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > 3 else "")


def describe(result: Mapping[str, Any]) -> str:
    """The summary of `evaluate_folders` as plain text, and what had no partner."""
    settings = result["settings"]
    lines = [
        f"{len(result['pairs'])} pairs, alignment {settings['align']}, {settings['resolution']} "
        f"voxels, tau {settings['tau']:g} (the reference is 2 long)",
        f"{'':16}{'mean':>10} {'median':>10}   95 % interval",
    ]
    for name, entry in result["summary"].items():
        lines.append(
            f"{METRICS[name].label:16}{entry['mean']:10.4g} {entry['median']:10.4g}   "
            f"{entry['low']:.4g} to {entry['high']:.4g}"
        )
    for key, what in (("only_in_reference", "reference"), ("only_in_candidate", "candidate")):
        if result[key]:
            lines.append(f"only among the {what}s: {', '.join(result[key])}")
    return "\n".join(lines)
