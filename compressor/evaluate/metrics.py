"""Compares meshes, in pairs or whole folders: overlap, distances, watertightness.

    result = evaluate_folders("originals", "compressed")
    print(describe(result))

Meshes of any origin can be compared: a pair is brought into one frame (the reference's box is
centred, its longest side from -1 to 1; the candidate is moved with it), then aligned. `METRICS`
defines each number; distances are in units of that frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitapack.compressor.evaluate.pair import Pair
from vitapack.compressor.evaluate.statistics import mean_interval
from vitapack.compressor.evaluate.voxels import dilate
from vitapack.compressor.options import EvaluateSettings
from vitapack.kernels.emd import emd
from vitapack.runtime.decode.mesh import READABLE, Mesh, load, report
from vitapack.runtime.errors import UserError
from vitapack.runtime.progress import Control


@dataclass(frozen=True)
class Metric:
    """One number of a comparison. A new metric only needs a row in METRICS."""

    label: str
    higher_is_better: bool
    definition: str
    compute: Callable[[Pair], float | None]  # None: not computed with these settings
    column: bool = True  # shown in the report's table; JSON has every metric
    floor: str = ""  # name of the metric with this one's value for no difference


def _emd(pair: Pair, other: Mesh, number: int) -> float | None:
    """EMD between samples of the reference and of `other`; None if EMD is not computed."""
    points = pair.settings.emd_points
    if not points:
        return None
    x, y = pair.sample(pair.reference, points, 0), pair.sample(other, points, number)
    return float(emd(x, y).distance)


def _f_score(pair: Pair) -> float:
    precision, recall = pair.precision, pair.recall
    return 2 * precision * recall / max(precision + recall, 1e-12)


METRICS = {
    "v_iou": Metric(
        "V-IoU",
        True,
        "Volume overlap: voxels in both solids over voxels in either. Solid: every voxel that the "
        "surface passes through or that a flood from outside cannot reach (6-connected; gaps of "
        "meshes that are not watertight are sealed up to 2 voxels). The reference's longest side "
        "has as many voxels as the stated resolution.",
        lambda pair: grid_iou(pair.reference_voxels.solid, pair.candidate_voxels.solid),
    ),
    "s_iou": Metric(
        "S-IoU",
        True,
        "Surface overlap: voxels that both surfaces pass through over voxels that either passes "
        "through, on the same lattice.",
        lambda pair: grid_iou(pair.reference_voxels.surface, pair.candidate_voxels.surface),
    ),
    "v_iou_tolerant": Metric(
        "V-IoU, 1 voxel",
        True,
        "Volume overlap in which a voxel also counts as shared when one of its 26 neighbours lies "
        "in the other solid: m / (m + misses of both), m the mean number of matches of the two.",
        lambda pair: grid_iou_tolerant(pair.reference_voxels.solid, pair.candidate_voxels.solid),
    ),
    "chamfer": Metric(
        "Chamfer",
        False,
        "Mean distance from a sample of one surface to the nearest sample of the other, averaged "
        "over both directions.",
        lambda pair: float(pair.nearest[0].mean() + pair.nearest[1].mean()) / 2,
    ),
    "chamfer_squared": Metric(
        "Chamfer²",
        False,
        "Mean squared distance to the nearest sample, summed over both directions: the paper's CD.",
        lambda pair: float((pair.nearest[0] ** 2).mean() + (pair.nearest[1] ** 2).mean()),
        column=False,
    ),
    "emd": Metric(
        "EMD",
        False,
        "Earth mover's distance: mean distance under the best one-to-one pairing of the samples of "
        "both surfaces. It never falls below the EMD floor.",
        lambda pair: _emd(pair, pair.candidate, 1),
        floor="emd_floor",
    ),
    "emd_floor": Metric(
        "EMD floor",
        False,
        "The same between two independent samples of the reference: what no difference looks like.",
        lambda pair: _emd(pair, pair.reference, 2),
        column=False,
    ),
    "f_score": Metric(
        "F-score",
        True,
        "Harmonic mean of precision and recall: the shares of the candidate's and the reference's "
        "samples that have a sample of the other within tau.",
        _f_score,
    ),
    "watertight": Metric(
        "watertight",
        True,
        "Share of candidates whose every edge has two faces.",
        lambda pair: pair.topology.watertight,
    ),
}


def grid_iou(a: Any, b: Any, level: float = 0.0) -> Any:
    """Intersection over union of two occupancy grids (..., X, Y, Z), numpy or torch.

    Values of other than bool grids count as occupied above `level`. Two empty grids give 1. Returns
    a float for three axes, with leading axes a float64 array of their shape.
    """
    a, b = _occupied(a, level), _occupied(b, level)
    _same_shape(a, b)
    return _ratio(_count(a & b), _count(a | b))


def grid_iou_tolerant(a: Any, b: Any, level: float = 0.0) -> Any:
    """`grid_iou` in which a voxel also matches any of its 26 neighbours in the other grid.

    m / (m + misses): m is the mean of both grids' matched voxels, misses the sum of both grids'
    unmatched ones. Without the neighbours this equals `grid_iou`.
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
    """Computes every metric of one pair, with its alignment and both meshes' topology, for JSON.

    Raises UserError for a mesh without faces or size.
    """
    pair = Pair(reference, candidate, settings or EvaluateSettings())
    values = {name: metric.compute(pair) for name, metric in METRICS.items()}
    row: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return row | {
        "precision": pair.precision,
        "recall": pair.recall,
        "alignment": {
            "degrees": pair.alignment.degrees,
            "shift": float(np.linalg.norm(pair.alignment.translation)),
            "scale": pair.alignment.scale,
        },
        "candidate": dataclasses.asdict(pair.topology),
        "reference": dataclasses.asdict(report(pair.reference)),
    }


def summarise(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean, median and the mean's 95 % bootstrap interval of every metric over rows of `compare`.

    Percentile bootstrap over objects with 2,000 resamples; one object gives an interval of width 0,
    which says nothing about others.
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
    """Compares the meshes of two folders that have the same name, in any format.

    Returns a dict for JSON: "settings", "definitions", "pairs" (rows of `compare` with "name" and
    both files), "summary" (as `summarise`), "only_in_reference" and "only_in_candidate".
    `control` reports the "pairs" and can cancel between them.

    Raises UserError if a folder is missing, has no meshes or two meshes of one name, if there are
    no common names, and if a mesh cannot be read (naming the file).
    """
    settings = settings or EvaluateSettings()
    control = control or Control()
    references, candidates = _meshes_in(reference_dir), _meshes_in(candidate_dir)
    names = sorted(references.keys() & candidates.keys())
    if not names:
        raise UserError(
            f"{reference_dir} and {candidate_dir} have no mesh of the same name "
            f"({_first_names(references)} against {_first_names(candidates)}); name pairs alike"
        )
    rows = []
    for number, name in enumerate(names):
        control.step("pairs", number, len(names))
        files = {"reference_file": str(references[name]), "candidate_file": str(candidates[name])}
        try:
            row = compare(load(references[name]), load(candidates[name]), settings)
        except UserError as error:
            label = (
                ""
                if str(references[name].parent) in str(error)
                or str(candidates[name].parent) in str(error)
                else f"{references[name]} and {candidates[name]}: "
            )
            raise UserError(f"{label}{error}") from error
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
    meshes: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in READABLE or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in meshes:
            raise UserError(
                f"{folder} has two meshes called {path.stem!r} ({meshes[path.stem].name} and "
                f"{path.name}); keep one"
            )
        meshes[path.stem] = path
    if not meshes:
        raise UserError(f"{folder}: has no meshes; expected {', '.join(READABLE)} files")
    return meshes


def _first_names(names: Mapping[str, Path]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > 3 else "")


def describe(result: Mapping[str, Any]) -> str:
    """The summary of `evaluate_folders` as plain text, with the meshes that have no counterpart."""
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
    for key, role in (("only_in_reference", "reference"), ("only_in_candidate", "candidate")):
        if result[key]:
            lines.append(f"only among the {role}s: {', '.join(result[key])}")
    return "\n".join(lines)
