"""Measures the bundled model: figures into JSON, then docs/furniture.md from it (page.py).

    python -m benchmarks.furniture.card --stability      # about 20 minutes on two cores
    python -m benchmarks.furniture.page                  # only docs/furniture.md, from the JSON

Quality: IoU to the true shapes of the held-out sets, with the autoencoder's ceiling, the nearest
training shape, and the agreement of two seeds. Compression: IoU to the model's own output with a
quarter of the blocks left out, in int8, in int4, with the automatic plan, and with as many blocks
pruned at random. The test shapes are for the final run only: `--sets test-shapes --no-compression`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.furniture.page import PAGE, RESULTS, write_page
from vitapack.compressor.evaluate.metrics import (
    EvaluateSettings,
    compare,
    grid_iou,
    grid_iou_tolerant,
)
from vitapack.compressor.evaluate.statistics import mean_interval
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.automatic import plan_auto
from vitapack.compressor.planning.files import describe as describe_plan
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.planning.layer_maps import plan_random
from vitapack.compressor.report.demo import grid_of
from vitapack.compressor.report.render import contact_sheet, frame_of, render
from vitapack.compressor.vitality.analyze import analyze
from vitapack.compressor.vitality.table import Vitality
from vitapack.runtime.decode.mesh import Mesh, surface_from_grid
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.furniture.family import BOUNDS, FOLDER, HeldOut, held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control

ROOT = Path(__file__).resolve().parents[2]
RANDOM_DRAWS = 3
LEFT_OUT = 0.25  # share of the blocks left out to measure redundancy
JUDGED = 24  # images that compression is judged on
POINTS = EvaluateSettings(emd_points=0, align="none")


def mesh_of(grid: np.ndarray) -> Mesh | None:
    try:
        return surface_from_grid(grid, BOUNDS)
    except UserError:
        return None


def interval(values: Iterable[float]) -> dict[str, float]:
    """Mean, median and 95 % bootstrap interval of the mean."""
    found = np.array(list(values), float)
    low, high = mean_interval(found, np.random.default_rng(0))
    row = {"mean": found.mean(), "median": np.median(found), "low": low, "high": high}
    return {key: round(float(value), 4) for key, value in row.items()} | {"n": len(found)}


def quality(pipeline: Pipeline, name: str, out: Path) -> dict:
    """Scores of one held-out set against the true shapes; writes its contact sheet."""
    views = list(held_out(name))
    rows, sheet = [], []
    for number, view in enumerate(views):
        print(f"{name} {number + 1}/{len(views)}", flush=True)
        first, second = (grid_of(pipeline, view, seed) for seed in (number, 1000 + number))
        truth = view.grid
        mesh, true_mesh = mesh_of(first), mesh_of(truth)
        row = {
            "name": view.name,
            **view.label,
            "v_iou": float(grid_iou(first, truth)),
            "v_iou_tolerant": float(grid_iou_tolerant(first, truth)),
            "two_seeds": float(grid_iou(first, second)),
            "f_score": compare(true_mesh, mesh, POINTS)["f_score"] if mesh else 0.0,
        }
        rows.append(row)
        frame = frame_of(*(m for m in (mesh, true_mesh) if m))
        renders = [render(m, 112, frame=frame) for m in (mesh, true_mesh) if m]
        sheet.append((f"{row['v_iou']:.2f}", [Image.open(view.image_path), *renders]))
    heading = ("image", "generated", "true shape")
    contact_sheet(sheet, heading, size=96, across=6).save(
        out / f"furniture-{name}.png", optimize=True
    )
    keys = ("v_iou", "v_iou_tolerant", "f_score", "two_seeds", "autoencoder_iou",
            "nearest_training_iou")  # fmt: skip
    return {"rows": rows, "summary": {key: interval(row[key] for row in rows) for key in keys}}


def compression(pipeline: Pipeline, work: Path, images: int, jobs: int) -> dict:
    """IoU of compressed models to the original, on images that the analysis did not use."""
    checkpoint = open_checkpoint("furniture")
    every = list(held_out("unseen-views"))
    studied, judged = every[-images:], every[:-images][:JUDGED]
    vitality = analyze(
        pipeline,
        [(p.name, Image.open(p.image_path)) for p in studied],
        work / f"vitality-{pipeline.source_sha256[:8]}.json",
        steps=10,
        curve_images=4,
        resume=True,
        jobs=jobs,
        control=Control(lambda at: print(f"{at.phase} {at.done}/{at.total}", flush=True)),
    )
    auto = plan_auto(vitality)
    eight = replace(auto, blocks=tuple(replace(b, bits=8) for b in auto.blocks), how="auto, int8")
    plans: dict[str, LayerMap] = {
        "int8, unpruned": resolve_plan("int8", checkpoint),
        "int4, unpruned": resolve_plan("int4", checkpoint),
        "automatic plan": auto,
        "the plan's blocks, all in int8": eight,
    }
    for seed in range(RANDOM_DRAWS):
        plans[f"as many blocks at random, int8, draw {seed + 1}"] = plan_random(seed, eight)
    full = {p.name: grid_of(pipeline, p, n) for n, p in enumerate(judged)}
    fewer = redundancy(pipeline, vitality, judged, full)
    fp16 = 2 * checkpoint.parameters()
    found = {}
    for title, plan in plans.items():
        print(title, flush=True)
        path = work / "packed.safetensors"
        sizes = compress(checkpoint, plan, path)
        packed = Pipeline.from_packed(path, device="cpu")
        start = time.perf_counter()
        grids = [(full[p.name], grid_of(packed, p, n), p.grid) for n, p in enumerate(judged)]
        seconds = (time.perf_counter() - start) / len(judged)
        found[title] = {
            "iou_to_original": interval(grid_iou(a, b) for a, b, _ in grids),
            "v_iou_to_truth": interval(grid_iou(c, b) for _, b, c in grids),
            "dit_bytes": sizes.dit,
            "file_bytes": sizes.total,
            "share_of_fp16": round(sizes.dit / fp16, 4),
            "blocks": len(plan.blocks),
            "seconds": round(seconds, 3),
        }
        path.unlink()
    return {
        "fp16_bytes": fp16,
        "redundancy": fewer,
        "plans": found,
        "auto": describe_plan(auto),
        "vitality": {
            "images": images,
            "stability": {name: vars(value) for name, value in vitality.stability.items()},
            "agreement": vitality.agreement,
            "blocks": [
                {key: getattr(block, key) for key in
                 ("kind", "index", "mean", "low", "high", "floor", "debiased", "iou", "latent_mse")}
                for block in vitality.blocks
            ],
        },
    }  # fmt: skip


def redundancy(
    pipeline: Pipeline, vitality: Vitality, judged: list[HeldOut], full: dict[str, np.ndarray]
) -> dict:
    """IoU to the original with a quarter of the blocks left out, not fine-tuned, not quantized.

    The least vital blocks, and as many of each kind at random.
    """
    count = round(LEFT_OUT * len(vitality.blocks))
    order = [(b.kind, b.index) for b in sorted(vitality.blocks, key=lambda b: b.mean)]
    least = order[:count]
    draws = {"least vital": least}
    for seed in range(RANDOM_DRAWS):
        rng = np.random.default_rng(seed)
        draw: list[tuple[str, int]] = []
        for kind in ("double", "single"):
            every = sorted(block for block in order if block[0] == kind)
            drawn = rng.choice(len(every), sum(k == kind for k, _ in least), replace=False)
            draw += [every[i] for i in drawn]
        draws[f"random draw {seed + 1}"] = draw
    found = {}
    for title, blocks in draws.items():
        print(f"left out, {title}: {blocks}", flush=True)
        dit = pipeline.dit.without(*blocks)
        scores = [
            grid_iou(full[p.name], grid_of(pipeline, p, n, dit)) for n, p in enumerate(judged)
        ]
        found[title] = {
            "blocks": [f"{kind} {index}" for kind, index in sorted(blocks)],
            "iou_to_original": interval(scores),
        }
    return found


def stability(pipeline: Pipeline, work: Path, jobs: int) -> dict:
    """Agreement of the blocks' order between disjoint halves of all unseen views.

    Images that `compression` has measured are read from its journal.
    """
    views = list(held_out("unseen-views"))
    vitality = analyze(
        pipeline,
        [(view.name, Image.open(view.image_path)) for view in views],
        work / f"vitality-{pipeline.source_sha256[:8]}.json",
        steps=10,
        curve=False,
        resume=True,
        jobs=jobs,
        control=Control(lambda at: print(f"{at.phase} {at.done}/{at.total}", flush=True)),
    )
    return {
        "images": len(views),
        "orders": {name: vars(value) for name, value in vitality.stability.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "card")
    parser.add_argument("--images", type=int, default=24, help="images for the vitality")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sets", nargs="*", default=["unseen-views", "validation-shapes"])
    parser.add_argument(
        "--no-compression", action="store_true", help="only the quality on the sets"
    )
    parser.add_argument(
        "--stability", action="store_true", help="stability of the blocks' order, on all images"
    )
    options = parser.parse_args()
    pictures = PAGE.parent / "pictures"
    for folder in (options.work, pictures, RESULTS.parent):
        folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"quality": {}}
    torch.set_num_threads(1)
    pipeline = Pipeline.from_model("furniture", device="cpu")
    if data.get("sha256") != pipeline.source_sha256:
        data = {"sha256": pipeline.source_sha256, "quality": {}}  # another model's figures
    data |= about()

    def save() -> None:
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")

    for name in options.sets:
        data["quality"][name] = quality(pipeline, name, pictures)
        save()
    if not options.no_compression:
        data["compression"] = compression(pipeline, options.work, options.images, options.jobs)
        save()
    if options.stability:
        data["stability"] = stability(pipeline, options.work, options.jobs)
        save()
    write_page()


def about() -> dict:
    checkpoint = open_checkpoint("furniture")
    lines = (FOLDER / "ATTRIBUTION.tsv").read_text().splitlines()
    return {
        "model": {
            "shapes": sum(line.endswith("autoencoder and DiT") for line in lines),
            "parameters": {
                "DiT": checkpoint.parameters(),
                "shape decoder": checkpoint.parameters("shape_decoder"),
                "image encoder": checkpoint.parameters("conditioner"),
            },
            "sampler": checkpoint.sampler.to_json(),
        },
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }


if __name__ == "__main__":
    main()
