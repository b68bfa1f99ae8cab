"""Measures the bundled model and writes its card: figures first (JSON), then tables and pictures.

    python -m benchmarks.furniture.card --stability      # about 20 minutes on two cores
    python -m benchmarks.furniture.card --pages-only     # docs/furniture.md from the JSON again

Quality to the true shape on the held-out sets, beside the autoencoder's ceiling and the nearest
training shape; how well two noises agree; then what compression keeps of the model's own output:
int8, int4, the automatic plan, and as many blocks pruned at random.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitapack.compressor.bootstrap import mean_interval
from vitapack.compressor.compress import compress
from vitapack.compressor.demo import grid_of
from vitapack.compressor.metrics import EvaluateSettings, compare, grid_iou, grid_iou_tolerant
from vitapack.compressor.plan import describe as describe_plan
from vitapack.compressor.plan import plan_auto, plan_random, resolve_plan
from vitapack.compressor.render import contact_sheet, frame_of, render
from vitapack.compressor.vitality import analyze
from vitapack.runtime.errors import UserError
from vitapack.runtime.families import open_checkpoint
from vitapack.runtime.families.furniture import BOUNDS, FOLDER, held_out
from vitapack.runtime.layermap import LayerMap
from vitapack.runtime.mesh import Mesh, surface_from_grid
from vitapack.runtime.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "furniture.json"
PAGE = ROOT / "docs" / "furniture.md"
SETS = {
    "unseen-views": "unseen views of training shapes",
    "validation-shapes": "unseen shapes (validation)",
    "test-shapes": "unseen shapes (test)",
}
RANDOM_DRAWS = 3
JUDGED = 24  # pictures that compression is judged on
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
    """One held-out set against the true shapes; writes its contact sheet."""
    pictures = list(held_out(name))
    rows, sheet = [], []
    for number, picture in enumerate(pictures):
        print(f"{name} {number + 1}/{len(pictures)}", flush=True)
        first, second = (grid_of(pipeline, picture, seed) for seed in (number, 1000 + number))
        truth = picture.grid
        mesh, true_mesh = mesh_of(first), mesh_of(truth)
        row = {
            "name": picture.name,
            **picture.label,
            "v_iou": float(grid_iou(first, truth)),
            "v_iou_tolerant": float(grid_iou_tolerant(first, truth)),
            "two_noises": float(grid_iou(first, second)),
            "f_score": compare(true_mesh, mesh, POINTS)["f_score"] if mesh else 0.0,
        }
        rows.append(row)
        frame = frame_of(*(m for m in (mesh, true_mesh) if m))
        views = [render(m, 112, frame=frame) for m in (mesh, true_mesh) if m]
        sheet.append((f"{row['v_iou']:.2f}", [Image.open(picture.image_path), *views]))
    heading = ("picture", "generated", "true shape")
    contact_sheet(sheet, heading, size=96, across=6).save(
        out / f"furniture-{name}.png", optimize=True
    )
    keys = ("v_iou", "v_iou_tolerant", "f_score", "two_noises", "autoencoder_iou",
            "nearest_training_iou")  # fmt: skip
    return {"rows": rows, "summary": {key: interval(row[key] for row in rows) for key in keys}}


def compression(pipeline: Pipeline, work: Path, images: int, jobs: int) -> dict:
    """What compression keeps of the model's output, on the pictures that vitality did not see."""
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
        progress=lambda done, total, what: print(f"{what} {done}/{total}", flush=True),
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
    fp16 = 2 * checkpoint.parameters()
    found = {}
    for title, plan in plans.items():
        print(title, flush=True)
        path = work / "packed.safetensors"
        sizes = compress(checkpoint, plan, path)
        packed = Pipeline.from_packed(path, device="cpu")
        grids = [(full[p.name], grid_of(packed, p, n), p.grid) for n, p in enumerate(judged)]
        found[title] = {
            "iou_to_original": interval(grid_iou(a, b) for a, b, _ in grids),
            "v_iou_to_truth": interval(grid_iou(c, b) for _, b, c in grids),
            "dit_bytes": sizes.dit,
            "file_bytes": sizes.total,
            "share_of_fp16": round(sizes.dit / fp16, 4),
            "blocks": len(plan.blocks),
        }
        path.unlink()
    return {
        "fp16_bytes": fp16,
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


def stability(pipeline: Pipeline, work: Path, jobs: int) -> dict:
    """The order of the blocks in disjoint halves of all unseen views; the pictures that
    `compression` has measured are taken from its journal."""
    pictures = list(held_out("unseen-views"))
    vitality = analyze(
        pipeline,
        [(p.name, Image.open(p.image_path)) for p in pictures],
        work / f"vitality-{pipeline.source_sha256[:8]}.json",
        steps=10,
        curve=False,
        resume=True,
        jobs=jobs,
        progress=lambda done, total, what: print(f"{what} {done}/{total}", flush=True),
    )
    return {
        "images": len(pictures),
        "orders": {name: vars(value) for name, value in vitality.stability.items()},
    }


def page(data: dict) -> str:
    """docs/furniture.md from the figures."""

    def cell(row: dict) -> str:
        return f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"

    lines = [
        "# The furniture model",
        "",
        "A real, small image-to-shape Diffusion Transformer that comes with vitapack, so that",
        "compression can be judged on a trained model. Canonical double/single-block DiT in the",
        "topology of Hunyuan3D-2mini (8 double + 16 single blocks, hidden size 128), trained on",
        f"{data['model']['shapes']} human-made shapes of Debian's `sweethome3d-furniture`;",
        "every shape's author and licence is in `runtime/bundled/furniture/ATTRIBUTION.tsv`.",
        "It is made for tests, demos and benchmarks of compression, not to reconstruct your chair:",
        "it knows the shapes that it was trained on, from views that it has not seen.",
        "",
        "Every figure here is written by `python -m benchmarks.furniture.card --stability`.",
        "",
        "## Parts",
        "",
        "| part | parameters | fp16 bytes |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {count:,} | {2 * count:,} |"
        for name, count in data["model"]["parameters"].items()
    ]
    lines += [
        "",
        "## Quality to the true shape",
        "",
        "Mean and 95 % bootstrap interval over the pictures of a set; 64^3 cells of [-1, 1]^3.",
        "The ceiling is the autoencoder given the true shape; the nearest training shape is chosen",
        "with the truth in hand.",
        "",
        "| set | n | V-IoU | V-IoU, 1 voxel | F-score 0.05 | ceiling | nearest training shape | "
        "two noises agree |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, words in SETS.items():
        if name in data["quality"]:
            s = data["quality"][name]["summary"]
            columns = ("v_iou", "v_iou_tolerant", "f_score", "autoencoder_iou",
                       "nearest_training_iou", "two_noises")  # fmt: skip
            cells = " | ".join(cell(s[key]) for key in columns)
            lines.append(f"| {words} | {s['v_iou']['n']} | {cells} |")
    unseen = data["quality"].get("validation-shapes", {}).get("summary")
    if unseen and unseen["v_iou"]["mean"] < unseen["nearest_training_iou"]["mean"]:
        lines += [
            "",
            "On unseen shapes it stays below the nearest training shape: no generalisation.",
        ]
    lines += [
        "",
        "Picture, generated shape, true shape; the number is the V-IoU:",
        "",
        "![unseen views](pictures/furniture-unseen-views.png)",
        "",
        "## What compression keeps",
        "",
        "IoU to the original's own output from the same noise, on unseen views that the vitality",
        f"analysis ({data['compression']['vitality']['images']} other pictures) did not use.",
        "",
        "| plan | blocks | network bytes | share of fp16 | IoU to original | V-IoU to truth |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for title, row in data["compression"]["plans"].items():
        lines.append(
            f"| {title} | {row['blocks']} | {row['dit_bytes']:,} | {row['share_of_fp16']:.1%} | "
            f"{cell(row['iou_to_original'])} | {cell(row['v_iou_to_truth'])} |"
        )
    vitality = data["compression"]["vitality"]
    lines += ["", "The automatic plan:", "", "```", data["compression"]["auto"], "```", ""]
    lines += ["## Vitality", "", "EMD to the full model's output with the block left out.", ""]
    lines += [
        "| block | vitality | floor | debiased | IoU to full |",
        "| --- | --- | --- | --- | --- |",
    ]
    for block in sorted(vitality["blocks"], key=lambda b: -b["mean"]):
        lines.append(
            f"| {block['kind']} {block['index']} | {cell(block)} | {block['floor']:.4f} | "
            f"{block['debiased']:.4f} | {block['iou']:.3f} |"
        )
    rows = []
    for name, value in vitality["stability"].items():
        rows.append((vitality["images"], name, value))
    for name, value in data.get("stability", {}).get("orders", {}).items():
        rows.append((data["stability"]["images"], name, value))
    lines += ["", "Order of the blocks in two disjoint halves of the pictures (Spearman, with the"]
    lines += ["2.5 to 97.5 % range of 500 random splits):", ""]
    lines += ["| pictures | blocks | Spearman |", "| --- | --- | --- |"]
    lines += [f"| {images} | {name} | {cell(value)} |" for images, name, value in rows]
    lines += [
        "",
        "## Training",
        "",
        "![curves](pictures/furniture-training.svg)",
        "",
        "Logs of the three trainings: `benchmarks/results/furniture-training.json`.",
        "",
        f"Measured with {data['versions']}.",
    ]
    return "\n".join(lines) + "\n"


def curves(logs: dict[str, list[dict]]) -> str:
    """An SVG with one panel a training: held-out scores against hours."""
    width, height, gap = 300, 180, 40
    parts = []
    for number, (name, rows) in enumerate(logs.items()):
        left = number * (width + gap) + gap
        hours = max(row["hours"] for row in rows)
        parts.append(
            f'<text x="{left}" y="14">{name}: IoU against hours (0 to {hours:.2f})</text>'
            f'<rect x="{left}" y="20" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        )
        keys = [k for k in rows[-1] if k in SCORES and any(k in row for row in rows)]
        for key, colour in zip(keys, ("#1769aa", "#b3541e", "#2e7d32", "#6a1b9a"), strict=False):
            points = " ".join(
                f"{left + width * row['hours'] / hours:.1f},{20 + height * (1 - row[key]):.1f}"
                for row in rows
                if key in row
            )
            y = 20 + height + 16 + 14 * keys.index(key)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                f'<text x="{left}" y="{y}" fill="{colour}">{key} {rows[-1][key]:.3f}</text>'
            )
    total = len(logs) * (width + gap) + gap
    style = 'font-family="sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height + 100}" {style}>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


SCORES = ("train", "unseen", "retrieval", "unseen_view_iou", "ceiling", "two_noises")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "card")
    parser.add_argument("--images", type=int, default=24, help="pictures for the vitality")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sets", nargs="*", default=["unseen-views", "validation-shapes"])
    parser.add_argument("--pages-only", action="store_true")
    parser.add_argument("--stability", action="store_true", help="order of blocks, all pictures")
    options = parser.parse_args()
    pictures = PAGE.parent / "pictures"
    for folder in (options.work, pictures, RESULTS.parent):
        folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"quality": {}}
    torch.set_num_threads(1)
    if options.stability or not options.pages_only:
        pipeline = Pipeline.from_model("furniture", device="cpu")
    if not options.pages_only:
        checkpoint = open_checkpoint("furniture")
        lines = (FOLDER / "ATTRIBUTION.tsv").read_text().splitlines()
        data["model"] = {
            "shapes": sum(line.endswith("autoencoder and DiT") for line in lines),
            "parameters": {
                "DiT": checkpoint.parameters(),
                "shape decoder": checkpoint.parameters("shape_decoder"),
                "image encoder": checkpoint.parameters("conditioner"),
            },
            "sampler": checkpoint.sampler.to_json(),
        }
        data["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}"
        for name in options.sets:
            data["quality"][name] = quality(pipeline, name, pictures)
            RESULTS.write_text(json.dumps(data, indent=1) + "\n")
        data["compression"] = compression(pipeline, options.work, options.images, options.jobs)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    if options.stability:
        data["stability"] = stability(pipeline, options.work, options.jobs)
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    logs = json.loads((RESULTS.parent / "furniture-training.json").read_text())
    (pictures / "furniture-training.svg").write_text(curves(logs))
    PAGE.write_text(page(data))


if __name__ == "__main__":
    main()
