"""The vitality table: measurements and statistics of every block, and their file.

    vitality = Vitality.load("vitality.json")
    vitality.of("single", 9).mean          # EMD with that block left out, averaged over the images

`vitapack.compressor.vitality` measures it, `vitapack.compressor.planning.automatic` turns it into a
layer map. Needs neither torch nor a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vitapack.compressor.evaluate.statistics import mean_interval
from vitapack.runtime.choices import METRICS
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.files import atomic_path
from vitapack.runtime.format.architecture import Architecture, architecture_from_json
from vitapack.runtime.format.container import one_line, parse_json
from vitapack.runtime.format.layermap import KINDS
from vitapack.runtime.format.schedules import SamplerDefaults

FORMAT = "vitapack-vitality"
VERSION = 1
SPLITS = 500
FLOOR_SIGMAS = 2.0  # a block is called non-vital within this many sd of the sampling floor


@dataclass(frozen=True)
class BlockVitality:
    """One block left out, averaged over the images. Distances in the unit of the frame [-1, 1]."""

    kind: str
    index: int
    mean: float  # V(l): mean distance to the original's cloud, sampling floor included
    low: float  # 95 % bootstrap interval of that mean over the images
    high: float
    floor: float  # distance between two samplings of one surface, mean over the images
    debiased: float  # the mean without the floor: sqrt(mean^2 - floor^2), at least 0
    sigmas: float  # (mean - floor) in standard deviations of the floor's mean
    non_vital: bool  # sigmas <= 2: indistinguishable from resampling the original's surface
    chamfer: float  # sum of the two mean squared nearest-neighbour distances
    latent_mse: float | None  # |z - z_full|^2 / |z_full|^2; None if it was never finite
    iou: float  # of the two grids' solid cells
    missing: int  # images that gave no surface
    bytes: int  # of the block in fp16, modulation included


@dataclass(frozen=True)
class CurvePoint:
    """The state after one more block was removed."""

    kind: str  # of the block that this step removed
    index: int
    distance: float
    floor: float
    debiased: float
    sigmas: float  # as for a block: up to 2, indistinguishable from the original's output
    reach: float  # 0: unchanged, 1: as far as another object's shape
    iou: float
    missing: int


@dataclass(frozen=True)
class Stability:
    """Spearman correlation of the block order between disjoint halves of the images."""

    mean: float
    low: float  # 2.5 and 97.5 % of the random splits
    high: float
    splits: int


@dataclass(frozen=True)
class Vitality:
    """The result of `analyze`. `rows` holds one record per image and removed set."""

    family: str
    variant: str  # the released model's name, "" if there is none
    model: str  # name of the checkpoint's file or folder
    source_sha256: str
    settings: dict[str, Any]  # metric, points, steps, guidance, sampler, seed, gap, curve_images
    totals: dict[str, int]  # blocks by kind
    network: Architecture  # the architecture, as in a packed file
    rest_bytes: int  # of all tensors outside the blocks, in fp16
    blocks: tuple[BlockVitality, ...]
    stability: dict[str, Stability]  # "all" and by kind; absent if the data are too few
    agreement: dict[str, float]  # Spearman of the vitality with "latent_mse" and "1 - iou"
    scale: float  # mean distance between the original's outputs for different images
    curves: dict[str, tuple[CurvePoint, ...]]  # "merged", by kind, and "balanced"
    images: tuple[
        dict[str, Any], ...
    ]  # name, sha256, noise_seed, floor draws, or reason of the skip
    rows: tuple[dict[str, Any], ...]

    def of(self, kind: str, index: int) -> BlockVitality:
        """The row of a block. Raises KeyError if it was not measured."""
        for block in self.blocks:
            if (block.kind, block.index) == (kind, index):
                return block
        raise KeyError(f"{kind} {index} was not measured")

    def ranked(self, kind: str | None = None) -> list[BlockVitality]:
        """Blocks by rising vitality; of equal ones the deepest first."""
        chosen = [block for block in self.blocks if kind in (None, block.kind)]
        return sorted(chosen, key=lambda block: (block.mean, -block.index, block.kind))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if self.totals.get(kind))

    def to_json(self) -> dict[str, Any]:
        network = {"network": self.network.to_json()}
        return {"format": FORMAT, "version": VERSION} | asdict(self) | network

    def save(self, path: str | Path) -> None:
        """Writes the file atomically; equal measurements give equal bytes."""
        text = json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Vitality:
        """Reads a vitality file.

        Raises UserError if it cannot be read, FormatError if it is no valid vitality file.
        """
        path = Path(path)
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; expected a vitality file") from error
        except ValueError as error:
            raise FormatError(
                f"{path}: not JSON ({one_line(error)}); run `analyze` again"
            ) from error
        try:
            return cls.from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else one_line(error)
            raise FormatError(
                f"{path}: not a vitality file ({reason}); run `analyze` again"
            ) from None

    @classmethod
    def from_json(cls, data: Any) -> Vitality:
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError or UserError if the data
        are invalid."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'expected an object with "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')!r}, this program reads {VERSION}")
        data = {key: value for key, value in data.items() if key not in ("format", "version")}
        if unknown := sorted(set(data) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown fields {', '.join(unknown)}")
        vitality = cls(
            **data
            | {
                "network": architecture_from_json(data["network"]),
                "blocks": tuple(BlockVitality(**block) for block in data["blocks"]),
                "stability": {k: Stability(**v) for k, v in data["stability"].items()},
                "curves": {
                    name: tuple(CurvePoint(**point) for point in curve)
                    for name, curve in data["curves"].items()
                },
                "images": tuple(data["images"]),
                "rows": tuple(data["rows"]),
            }
        )
        vitality._check()
        return vitality

    def _check(self) -> None:
        texts = (self.family, self.variant, self.model, self.source_sha256)
        if not all(isinstance(text, str) and len(text) <= 4096 for text in texts):
            raise ValueError("family, variant, model and source_sha256 must be short texts")
        counts = self.totals.values()
        if not all(type(count) is int and 0 <= count < 10_000 for count in counts):
            raise ValueError(f"totals {self.totals}: expected counts by block kind")
        wanted = {(kind, i) for kind, n in self.totals.items() for i in range(n)}
        found = [(block.kind, block.index) for block in self.blocks]
        if set(found) != wanted or len(found) != len(wanted) or set(self.totals) - set(KINDS):
            raise ValueError(f"{len(found)} blocks do not match totals {self.totals}")
        if not wanted:
            raise ValueError("no blocks, so there is nothing to plan")
        held = self.network.blocks_by_kind()
        for kind in {*held, *self.totals}:
            if held.get(kind, ()) != tuple(range(self.totals.get(kind, 0))):
                raise ValueError(f"network: {kind} blocks do not match totals {self.totals}")
        if self.settings["metric"] not in METRICS:
            raise ValueError(f"metric {self.settings['metric']!r}")
        SamplerDefaults.from_json(self.settings["sampler"])
        points = [point for curve in self.curves.values() for point in curve]
        if any((point.kind, point.index) not in wanted for point in points):
            raise ValueError("a curve removes a block that this network does not have")
        if not all(isinstance(row, dict) and isinstance(row["image"], str) for row in self.rows):
            raise ValueError("rows: expected an object with an image each")
        entries: list[BlockVitality | CurvePoint] = [*self.blocks, *points]
        numbers = [
            getattr(entry, field.name)
            for entry in entries
            for field in fields(entry)
            if field.type == "float"
        ]
        if not all(type(x) in (int, float) and abs(x) < 1e15 for x in (*numbers, self.scale)):
            raise ValueError("a distance is not a finite number")
        if self.scale <= 0:
            raise ValueError(f"scale {self.scale} is not above 0")


def debias(distance: float, floor: float, metric: str) -> float:
    """The distance without its sampling floor, never below 0.

    EMD: subtracted in quadrature, which tracks known changes best (within 10 % at a 10 % stretch;
    plain subtraction loses a third of a 3 % one). Chamfer² is a mean of squares already, so
    its floor is subtracted plainly.
    """
    if metric == "chamfer":
        return max(0.0, distance - floor)
    return math.sqrt(max(0.0, distance**2 - floor**2))


def reach(debiased: float, scale: float, metric: str) -> float:
    """Distance relative to that of an unrelated shape, as a ratio of lengths for both metrics."""
    return math.sqrt(debiased / scale) if metric == "chamfer" else debiased / scale


def sigmas_above(mean: float, floor: float, floors: Sequence[Sequence[float]]) -> float:
    """How many standard deviations a mean distance lies above the mean sampling floor.

    floors: the draws of each image's floor. If nothing changed, an image's distance would be
    another draw. The variance of a draw is pooled over the images (two degrees of freedom each),
    plus that of the floor, which is itself a mean of the draws.
    """
    draws = np.array(floors)
    variance = float(draws.var(axis=1, ddof=1).mean()) * (1 + 1 / draws.shape[1])
    sd = math.sqrt(variance / len(draws))
    return (mean - floor) / max(sd, 1e-9 * floor, 1e-30)


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean of the rows' values under `key`."""
    return float(np.mean([row[key] for row in rows]))


def summarize(
    kind: str,
    index: int,
    rows: Sequence[Mapping[str, Any]],
    floors: Sequence[Sequence[float]],
    *,
    metric: str,
    nbytes: int,
) -> BlockVitality:
    """One block's row of the table.

    rows: its records, one per image; floors: draws of each image's floor; nbytes: of the block.
    """
    values = np.array([row["distance"] for row in rows])
    low, high = mean_interval(values, np.random.default_rng(0))
    mean, floor = float(values.mean()), float(np.mean([row["floor"] for row in rows]))
    sigmas = sigmas_above(mean, floor, floors)
    finite = [row for row in rows if row["latent_mse"] is not None]
    return BlockVitality(
        kind=kind,
        index=index,
        mean=mean,
        low=low,
        high=high,
        floor=floor,
        debiased=debias(mean, floor, metric),
        sigmas=sigmas,
        non_vital=sigmas <= FLOOR_SIGMAS,
        chamfer=mean_of(rows, "chamfer"),
        latent_mse=mean_of(finite, "latent_mse") if finite else None,
        iou=mean_of(rows, "iou"),
        missing=sum(not row["surface"] for row in rows),
        bytes=nbytes,
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; ties share their mean rank. None if one side is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(side) - (len(side) + 1) / 2 for side in (a, b)]
    size = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / size if size > 0 else None


def split_halves(table: np.ndarray, splits: int = SPLITS) -> Stability | None:
    """Agreement of disjoint halves of the images on the order of the blocks.

    table: (images, blocks) distances. None for fewer than 4 images or 3 blocks.
    """
    images, blocks = table.shape
    if images < 4 or blocks < 3:
        return None
    rng = np.random.default_rng(0)
    rhos = []
    for _ in range(splits):
        order = rng.permutation(images)
        half = images // 2
        rho = spearman(table[order[:half]].mean(0), table[order[half : 2 * half]].mean(0))
        if rho is not None:
            rhos.append(rho)
    if not rhos:
        return None
    low, high = np.quantile(rhos, (0.025, 0.975))
    return Stability(float(np.mean(rhos)), float(low), float(high), len(rhos))


def by_kind(
    blocks: Sequence[tuple[str, int]], measure: Callable[[list[int]], Stability | None]
) -> dict[str, Stability]:
    """`measure` of the columns of all blocks ("all") and of each kind, without None results."""
    groups = {"all": list(range(len(blocks)))}
    for column, (kind, _) in enumerate(blocks):
        groups.setdefault(kind, []).append(column)
    measured = {name: measure(columns) for name, columns in groups.items()}
    return {name: stability for name, stability in measured.items() if stability is not None}


def describe(vitality: Vitality) -> str:
    """The table as text: blocks by falling vitality, stability, curves, skipped images."""
    images = sum("skipped" not in image for image in vitality.images)
    settings = vitality.settings
    lines = [
        f"{vitality.variant or vitality.family} ({vitality.model}): {images} images, "
        f"{settings['metric']} of {settings['points']} points, "
        f"{settings['sampler']['steps']} steps",
        "block        vitality   95 % interval     debiased  IoU    latent MSE",
    ]
    top = max(block.mean for block in vitality.blocks)
    for block in reversed(vitality.ranked()):
        change = "     -" if block.latent_mse is None else f"{block.latent_mse:10.4f}"
        remark = "  at the sampling floor" if block.non_vital else ""
        remark += f"  no surface in {block.missing} of {images}" if block.missing else ""
        bar = "#" * round(20 * block.mean / top) if top > 0 else ""
        lines.append(
            f"{block.kind:6} {block.index:2}   {block.mean:9.4f}  "
            f"{block.low:7.4f} {block.high:7.4f}  {block.debiased:9.4f}  {block.iou:5.3f} "
            f"{change}  {bar}{remark}"
        )
    lines.append(
        f"sampling floor {np.mean([b.floor for b in vitality.blocks]):.4f}; two unrelated outputs "
        f"are {vitality.scale:.4f} apart"
    )
    for name, stability in vitality.stability.items():
        lines.append(
            f"order in disjoint halves of the images, {name} blocks: Spearman {stability.mean:.3f} "
            f"({stability.low:.3f} to {stability.high:.3f})"
        )
    for name, rho in vitality.agreement.items():
        lines.append(f"agreement with the order by {name}: Spearman {rho:.3f}")
    for name, curve in vitality.curves.items():
        steps = ", ".join(f"{p.kind[0]}{p.index} {p.debiased:.3f}/{p.iou:.2f}" for p in curve)
        lines.append(f"removed one after another ({name}), distance/IoU: {steps}")
    for image in vitality.images:
        if "skipped" in image:
            lines.append(f"skipped {image['name']}: {image['skipped']}")
    return "\n".join(lines)
