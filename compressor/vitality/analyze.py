"""Measures every block's vitality: one ablation per block and image, then pruning curves.

    vitality = analyze(pipeline, [("chair", image), ...], Path("vitality.json"), resume=True)

V(l) is the mean over the images of the distance between point clouds of the original's mesh and of
the mesh without block l, from the same condition, noise, steps and guidance (paper, section 3.1).
The pruning curves then remove blocks one after another, the least vital first, until the output
breaks (sections 3.2.1, C.3). Cost: L + 1 generations per image, and about as many again for the
curves on `curve_images` images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vitapack.compressor.options import AnalyzeOptions
from vitapack.compressor.vitality.ablation import (
    BlockId,
    Job,
    RunJobs,
    Settings,
    chamfer,
    runner,
)
from vitapack.compressor.vitality.journal import Journal
from vitapack.compressor.vitality.table import (
    CurvePoint,
    Vitality,
    by_kind,
    debias,
    describe,
    mean_of,
    reach,
    sigmas_above,
    spearman,
    split_halves,
    summarize,
)
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.layermap import KIND_OF
from vitapack.runtime.options import merged
from vitapack.runtime.progress import Control

if TYPE_CHECKING:
    from vitapack.runtime.networks.network import Network
    from vitapack.runtime.pipeline.pipeline import Pipeline

__all__ = ["Vitality", "analyze", "chamfer", "describe"]

# A curve ends at half the distance to an unrelated shape, or below an IoU of a tenth.
BROKEN_REACH = 0.5
BROKEN_IOU = 0.1


def analyze(
    pipeline: Pipeline,
    images: Sequence[tuple[str, Image.Image]],
    out: Path,
    options: AnalyzeOptions | None = None,
    *,
    control: Control | None = None,
    **changes: Any,
) -> Vitality:
    """Measures every block, writes `out` atomically and returns the vitality table.

    images: (name, image) pairs. changes: fields of the options.

    The original's surface is sampled once per image, and all clouds of an image are compared in its
    frame: bounding box centred, half of the longest side 1. If an ablation yields no surface, it
    counts as the shape collapsed into its centroid, and is flagged. That distance exceeds that of
    any recognisable shape, but is bounded, so that one failure does not dominate a mean. An image
    for which the original yields no surface is skipped and listed.

    The sampling floor is the mean of EMD(X, X') over three more clouds X' of the original's
    surface; if the distance is near the floor, EMD(Y, Y') of the ablation's surface is averaged in.
    X and Y are the clouds of the measurement itself, so that their sampling error cancels.

    Records are appended to OUT's .journal.jsonl as they are made; the original's outputs stay in
    its .cache folder until the run ends. `resume` continues from both and writes the same bytes.
    The result does not depend on the number of worker processes `jobs`; they use the caller's
    torch.get_num_threads(). A cancelled run can be resumed like an interrupted one.

    Raises UserError if there are no usable images, if names or images repeat, if the model is
    already pruned, if the settings are bad, or if the journal has other settings.
    """
    options = merged(AnalyzeOptions, options, changes)
    control = control or Control()
    out = Path(out)
    sampler = pipeline.settings(options.steps, options.guidance, None).to_json()
    settings = Settings(options.metric, options.points, sampler, options.seed, options.gap)
    _check(pipeline, images, options.jobs)
    blocks, totals = _blocks_of(pipeline.dit)
    identity = {"family": pipeline.family, "model": pipeline.source_sha256, **asdict(settings)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    cache = out.with_name(f"{out.stem}.cache")
    if not options.resume:
        shutil.rmtree(cache, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        path = out.with_name(f"{out.stem}.journal.jsonl")
        journal = Journal(path, key, resume=options.resume)
        stack.callback(journal.close)
        run = stack.enter_context(runner(pipeline, settings, cache, options.jobs, control))
        work = _Work(journal, run, cache, images, control)
        names = work.full_outputs()
        work.phase("one block left out", len(names) * len(blocks))
        rows = work.without([(name, (block,)) for name in names for block in blocks])
        measured = _Measured(names, blocks, totals, rows, work.scale(names))
        vitality = _tabulate(pipeline, settings, work, measured)
        if options.curve:
            curves, more = _curves(vitality, work, names[: options.curve_images], options.metric)
            measured = replace(measured, rows=rows | more)
            vitality = _tabulate(pipeline, settings, work, measured, curves, options.curve_images)
        vitality.save(out)
    shutil.rmtree(cache, ignore_errors=True)
    return vitality


def _check(pipeline: Pipeline, images: Sequence[tuple[str, Image.Image]], jobs: int) -> None:
    if jobs > 1 and next(pipeline.dit.parameters()).device.type != "cpu":
        raise UserError("--jobs applies to CPUs only: use --jobs 1 on a GPU")
    if not images:
        raise UserError("no images to analyze: give a folder with at least one image")
    names = [name for name, _ in images]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two images are called {repeated[0]!r}; names must differ")


def _blocks_of(dit: Network) -> tuple[list[BlockId], dict[str, int]]:
    """Every block in execution order, and the number of blocks by kind. Raises UserError if the
    model is pruned or has no blocks."""
    kept = dit.config.blocks_by_kind()
    for kind, indices in kept.items():
        if tuple(indices) != tuple(range(len(indices))):
            raise UserError(
                f"this model is already pruned ({kind} blocks {', '.join(map(str, indices))} are "
                "left); analyze the original checkpoint"
            )
    blocks = [(kind, index) for kind, indices in kept.items() for index in indices]
    if not blocks:
        raise UserError("this model has no blocks to leave out")
    return blocks, {kind: len(indices) for kind, indices in kept.items() if indices}


def _fp16_bytes(dit: Network, totals: dict[str, int]) -> dict[str, int]:
    """fp16 bytes of one block of each kind (blocks of a kind are equal), and of the "rest"."""
    sizes = dict.fromkeys((*totals, "rest"), 0)
    for name, tensor in dit.state_dict().items():
        head, _, tail = name.partition(".")
        kind = KIND_OF.get(head, "")
        if kind in totals:
            sizes[kind] += 2 * tensor.numel() * tail.startswith("0.")
        else:
            sizes["rest"] += 2 * tensor.numel()
    return sizes


def _digest(image: Image.Image) -> str:
    """Digest of the pixels, not of the file."""
    state = hashlib.sha256(f"{image.mode} {image.size}".encode())
    state.update(image.tobytes())
    return state.hexdigest()[:32]


class _Work:
    """Runs the jobs that the journal does not hold yet, and reports progress."""

    def __init__(
        self,
        journal: Journal,
        run: RunJobs,
        cache: Path,
        images: Sequence[tuple[str, Image.Image]],
        control: Control,
    ) -> None:
        self.journal, self.run, self.cache, self.control = journal, run, cache, control
        self.images = dict(images)
        self.digests = {name: _digest(image) for name, image in images}
        seen: dict[str, str] = {}
        for name, digest in self.digests.items():
            if digest in seen:
                raise UserError(f"{seen[digest]} and {name} are the same image; remove one")
            seen[digest] = name

    def phase(self, label: str, total: int) -> None:
        """Starts a phase of the progress, with `total` jobs."""
        self.label, self.done, self.total = label, 0, total
        self.control.step(label, 0, total)

    def full_outputs(self) -> list[str]:
        """Runs the original on all images and returns the names of those that gave a shape.

        Raises UserError if none did.
        """
        self.phase("full model", len(self.images))
        known = [name for name, digest in self.digests.items() if f"full {digest}" in self.journal]
        self._tick(len(known))
        self._fill([name for name in self.images if name not in known])
        usable = [name for name in self.images if "skipped" not in self.record(name)]
        if not usable:
            name = next(iter(self.images))
            raise UserError(f"no image gave a shape; {name}: {self.record(name)['skipped']}")
        return usable

    def record(self, name: str) -> dict[str, Any]:
        return self.journal[f"full {self.digests[name]}"]

    def without(
        self, wanted: Iterable[tuple[str, tuple[BlockId, ...]]]
    ) -> dict[tuple[str, tuple[BlockId, ...]], dict[str, Any]]:
        """Records by image name and removed set. Sets are sorted, so that curves share records."""
        label = {
            (name, removed): f"without {self.digests[name]} {json.dumps(sorted(removed))}"
            for name, removed in wanted
        }
        missing = [pair for pair in label if label[pair] not in self.journal]
        self._tick(len(label) - len(missing))
        self._restore(name for name, _ in missing)
        jobs: list[Job] = [
            ("without", (self.digests[name], tuple(sorted(removed)))) for name, removed in missing
        ]
        for position, record in self.run(jobs):
            self.journal.add(label[missing[position]], record)
            self._tick()
        return {pair: self.journal[label[pair]] for pair in label}

    def scale(self, names: Sequence[str]) -> float:
        """Mean distance between the original's outputs for images half the list apart, because
        neighbours are often images of one object. A single output is compared with itself collapsed
        into its centroid."""
        half = max(1, len(names) // 2)
        pairs = [(a, names[(i + half) % len(names)]) for i, a in enumerate(names)]
        pairs = pairs[:half] if half * 2 == len(names) else pairs  # else every pair twice
        label = {(a, b): f"pair {self.digests[a]} {self.digests[b]}" for a, b in pairs}
        missing = [pair for pair in label if label[pair] not in self.journal]
        self._restore(name for pair in missing for name in pair)
        jobs: list[Job] = [("pair", (self.digests[a], self.digests[b])) for a, b in missing]
        for position, record in self.run(jobs):
            self.journal.add(label[missing[position]], record)
        return float(np.mean([self.journal[label[pair]]["distance"] for pair in pairs]))

    def _restore(self, names: Iterable[str]) -> None:
        """Generates the original's outputs again that are needed and missing from the cache."""
        cached = {name: self.cache / f"{self.digests[name]}.npz" for name in names}
        missing = [name for name, path in cached.items() if not path.exists()]
        self.total += len(missing)
        self._fill(missing)

    def _fill(self, names: Sequence[str]) -> None:
        jobs: list[Job] = [
            ("full", (self.digests[name], name, self.images[name])) for name in names
        ]
        for position, record in self.run(jobs):
            self.journal.add(f"full {self.digests[names[position]]}", record)
            self._tick()

    def _tick(self, count: int = 1) -> None:
        self.done += count
        self.control.report(self.label, self.done, max(self.done, self.total))


# --- Curves and the table ----------------------------------------------------------------------

Rows = dict[tuple[str, tuple[BlockId, ...]], dict[str, Any]]


@dataclass(frozen=True)
class _Measured:
    """The measurements from which the table is computed."""

    names: list[str]  # of the images that gave a shape
    blocks: list[BlockId]
    totals: dict[str, int]
    rows: Rows  # by image and removed blocks
    scale: float  # see `_Work.scale`


def _curves(
    vitality: Vitality, work: _Work, names: Sequence[str], metric: str
) -> tuple[dict[str, tuple[CurvePoint, ...]], Rows]:
    """Removes blocks one after another until the output breaks; one block of each kind is kept.

    By kind: only blocks of that kind. "merged": both kinds in one order of vitality. "balanced":
    both kinds, in the order in which their own curves reach a distance. Vitalities of two kinds are
    not comparable (the paper's reason for separate thresholds), distances of whole outputs are;
    every point of this curve is a pair of thresholds.
    """
    rows: Rows = {}
    # An upper bound: curves may end early.
    work.phase("blocks removed in turn", 2 * len(names) * len(vitality.blocks))

    floors = [work.record(name)["floors"] for name in names]

    def remove_in(order: Sequence[BlockId]) -> tuple[CurvePoint, ...]:
        points: list[CurvePoint] = []
        removed: tuple[BlockId, ...] = ()
        left = dict(vitality.totals)
        for kind, index in order:
            if left[kind] == 1:
                continue
            left[kind] -= 1
            removed += ((kind, index),)
            records = work.without([(name, tuple(sorted(removed))) for name in names])
            rows.update(records)
            point = _point((kind, index), list(records.values()), floors, vitality.scale, metric)
            points.append(point)
            if _broken(point, len(names)):
                break
        return tuple(points)

    curves: dict[str, tuple[CurvePoint, ...]] = {}
    for kind in vitality.kinds:
        curves[kind] = remove_in([(block.kind, block.index) for block in vitality.ranked(kind)])
    if len(vitality.kinds) > 1:
        curves["merged"] = remove_in([(block.kind, block.index) for block in vitality.ranked()])
        steps = []
        for kind in vitality.kinds:
            furthest = np.maximum.accumulate([0.0, *(p.debiased for p in curves[kind])])[1:]
            steps += [
                (distance, position, kind, point.index)
                for position, (distance, point) in enumerate(
                    zip(furthest, curves[kind], strict=True)
                )
            ]
        curves["balanced"] = remove_in([(kind, index) for _, _, kind, index in sorted(steps)])
    work.total = work.done
    work.control.report(work.label, work.done, work.total)
    return curves, rows


def _point(
    block: BlockId,
    rows: Sequence[dict[str, Any]],
    floors: Sequence[Sequence[float]],
    scale: float,
    metric: str,
) -> CurvePoint:
    distance, floor = mean_of(rows, "distance"), mean_of(rows, "floor")
    debiased = debias(distance, floor, metric)
    return CurvePoint(
        kind=block[0],
        index=block[1],
        distance=distance,
        floor=floor,
        debiased=debiased,
        sigmas=sigmas_above(distance, floor, floors),
        reach=reach(debiased, scale, metric),
        iou=mean_of(rows, "iou"),
        missing=sum(not row["surface"] for row in rows),
    )


def _broken(point: CurvePoint, images: int) -> bool:
    return point.reach >= BROKEN_REACH or point.iou < BROKEN_IOU or 2 * point.missing > images


def _tabulate(
    pipeline: Pipeline,
    settings: Settings,
    work: _Work,
    measured: _Measured,
    curves: dict[str, tuple[CurvePoint, ...]] | None = None,
    curve_images: int = 0,
) -> Vitality:
    sizes = _fp16_bytes(pipeline.dit, measured.totals)
    floors = [work.record(name)["floors"] for name in measured.names]
    per_block = [
        [measured.rows[name, (block,)] for name in measured.names] for block in measured.blocks
    ]
    table = tuple(
        summarize(
            *block,
            rows,
            floors,
            metric=settings.metric,
            nbytes=sizes[block[0]],
        )
        for block, rows in zip(measured.blocks, per_block, strict=True)
    )
    distances = np.array([[row["distance"] for row in rows] for rows in per_block]).T
    means = [block.mean for block in table]
    checks = {
        "1 - iou": [1 - block.iou for block in table],
        "latent_mse": [float("inf") if b.latent_mse is None else b.latent_mse for b in table],
    }
    agreement = {name: spearman(means, values) for name, values in checks.items()}
    images = [
        {"name": name, "sha256": work.digests[name], **work.record(name)} for name in work.images
    ]
    flat = [
        {"image": name, "removed": [list(block) for block in removed], **record}
        for (name, removed), record in measured.rows.items()
    ]
    return Vitality(
        family=pipeline.family,
        variant=getattr(pipeline, "variant", ""),
        model=Path(pipeline.source).name,
        source_sha256=pipeline.source_sha256,
        settings=asdict(settings) | {"curve_images": min(curve_images, len(measured.names))},
        totals=measured.totals,
        network=pipeline.dit.config,
        rest_bytes=sizes["rest"],
        blocks=table,
        stability=by_kind(measured.blocks, lambda columns: split_halves(distances[:, columns])),
        agreement={name: rho for name, rho in agreement.items() if rho is not None},
        scale=measured.scale,
        curves=curves or {},
        images=tuple(images),
        rows=tuple(sorted(flat, key=lambda row: (len(row["removed"]), row["image"], str(row)))),
    )
