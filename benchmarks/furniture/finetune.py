"""Measures fine-tuning on the furniture model: figures into JSON, then docs/furniture.md.

    apt-get download sweethome3d-furniture && dpkg-deb -x sweethome3d-furniture_*.deb FOLDER
    python -m benchmarks.furniture.finetune FOLDER/usr/share/sweethome3d/furniture plan.json

The training images are renders of the model's own training shapes, from views that it was trained
on. The result is judged on the bundled unseen views: other views of some of these shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.furniture.card import JUDGED, interval
from benchmarks.furniture.data import Entry, catalogue, normalise, read_obj, render_views
from benchmarks.furniture.page import FINETUNING, write_page
from vitapack.compressor.distill.finetune import finetune
from vitapack.compressor.evaluate.metrics import grid_iou
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.report.demo import grid_of
from vitapack.runtime.choices import TRAINED_BLOCKS
from vitapack.runtime.families.furniture.family import FOLDER, held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control, Progress


def training_images(archives: Path, out: Path, count: int, jobs: int) -> list[Path]:
    """One image of each of `count` random training shapes; renders those that do not exist yet."""
    rows = (FOLDER / "ATTRIBUTION.tsv").read_text().splitlines()
    trained = {row.split("\t")[0] for row in rows if row.endswith("autoencoder and DiT")}
    entries = [
        (archive, entry)
        for archive in sorted(archives.glob("*.sh3f"))
        for entry in catalogue(archive)
        if entry.id in trained
    ]
    if not entries:
        raise SystemExit(f"{archives}: no archive with a training shape of the model")
    chosen = np.random.default_rng(0).permutation(len(entries))[:count]
    out.mkdir(parents=True, exist_ok=True)
    work = [(*entries[i], out / f"{number:03}.png") for number, i in enumerate(chosen)]
    with Pool(jobs) as pool:
        return pool.map(render_one, work)


def render_one(job: tuple[Path, Entry, Path]) -> Path:
    archive, entry, path = job
    if not path.exists():
        with zipfile.ZipFile(archive) as files:
            vertices, faces = read_obj(files.read(entry.model).decode("latin-1"))
        seed = int(hashlib.sha256(entry.id.encode()).hexdigest()[8:16], 16)  # as in data.py
        rng = np.random.default_rng(seed)
        views, _ = render_views(normalise(vertices, entry), faces, 1, rng)
        Image.fromarray(views[0]).save(path)
    return path


def judge(packed: Path, original: list[np.ndarray]) -> tuple[dict, np.ndarray]:
    """IoU to the original's output from the same noise and to the truth; and the first by image."""
    pipeline = Pipeline.from_packed(packed, "cpu")
    judged = list(held_out("unseen-views"))[: len(original)]
    grids = [grid_of(pipeline, view, number) for number, view in enumerate(judged)]
    ious = np.array([grid_iou(*pair) for pair in zip(original, grids, strict=True)])
    truth = interval(grid_iou(view.grid, g) for view, g in zip(judged, grids, strict=True))
    return {"iou_to_original": interval(ious), "v_iou_to_truth": truth}, ious


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archives", type=Path, help="the folder with the .sh3f archives")
    parser.add_argument("plan", help="plan.json, such as the demo's")
    parser.add_argument("--work", type=Path, default=Path("build/finetune"))
    parser.add_argument("--blocks", nargs="+", choices=TRAINED_BLOCKS, default=TRAINED_BLOCKS)
    parser.add_argument("--images", type=int, default=698)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    images = training_images(options.archives, options.work / "images", options.images, 2)
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint("furniture")
    plan = resolve_plan(options.plan, checkpoint)
    packed = options.work / "packed.safetensors"
    sizes = compress(checkpoint, plan, packed)
    original = Pipeline.from_model("furniture", "cpu")
    judged = list(held_out("unseen-views"))[:JUDGED]
    full = [grid_of(original, view, number) for number, view in enumerate(judged)]
    before, plain = judge(packed, full)
    keys = ("images", "iterations", "batch", "lr", "threads")
    training = {key: getattr(options, key) for key in keys}
    found = json.loads(FINETUNING.read_text()) if FINETUNING.exists() else {}
    if (found.get("model"), found.get("training")) != (original.source_sha256, training):
        found = {
            "model": original.source_sha256,
            "training": training,
            "blocks": len(plan.blocks),
            "share_of_fp16": round(sizes.dit / (2 * checkpoint.parameters()), 4),
            "before": before,
            "after": {},
            "torch": torch.__version__,
        }
    FINETUNING.write_text(json.dumps(found, indent=1) + "\n")
    for blocks in options.blocks:
        print(blocks, flush=True)
        out = options.work / f"{blocks}.safetensors"
        note = finetune(
            "furniture", packed, images, out, blocks=blocks, iterations=options.iterations,
            batch=options.batch, lr=options.lr, control=Control(say),
        )  # fmt: skip
        row = {key: note[key] for key in ("blocks", "loss_before", "loss_after")}
        after, tuned = judge(out, full)
        row |= after | {"gain": interval(tuned - plain)}
        found = json.loads(FINETUNING.read_text())  # another process may have added rows
        found["after"][blocks] = row
        FINETUNING.write_text(json.dumps(found, indent=1) + "\n")
        print(row, flush=True)
    write_page()


def say(at: Progress) -> None:
    if at.done % 100 == 0:
        print(f"{at.phase} {at.done}/{at.total}", flush=True)


if __name__ == "__main__":
    main()
