"""Compares coarse-to-fine evaluation of the grid with dense evaluation, at the default resolution.

    python -m benchmarks.published.grids furniture --work /tmp/grids  # six unseen images
    python -m benchmarks.published.grids hunyuan3d-2mini --work /tmp/grids --resolution 192
    python -m benchmarks.published.grids page  # docs/published.md from the JSON

No trained ShapeVAE was available. The bundled model's decoder gives 64^3 logits. They are evaluated
in two forms: interpolated between their nodes, and as a small ShapeVAE decoder fitted to their
occupancy, a network in the released architecture whose field is rougher than an interpolation. A
released decoder in full size has random weights. Every evaluation runs in a fresh process. Meshes
are compared before cleaning, which could hide floaters.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.published import run as published
from vitapack.compressor.tools.random_checkpoint import write
from vitapack.runtime.decode.grid import Field, coarse_to_fine, dense
from vitapack.runtime.decode.mesh import report, surface_from_grid
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.families.furniture.family import BOUNDS, held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.loading.memory import reset_peak, resident, return_large_blocks
from vitapack.runtime.pipeline.load import load_shape_decoder
from vitapack.runtime.pipeline.pipeline import Pipeline

# Of the unseen views: thin rods, thin sheets, several pieces, and one thick shape.
IMAGES = (
    "07-wheelchair", "13-bamboo", "15-lamp", "16-armchair", "34-bathmat", "39-electric-guitar",
)  # fmt: skip
# The whole released architecture, small enough for 57 million queries in minutes on one core.
FITTED = ShapeDecoderConfig(
    latents=64, channels=16, width=32, heads=1, layers=1, num_freqs=8, include_pi=False,
    qkv_bias=False, qk_norm=True, scale_factor=1.0, bounds=BOUNDS,
)  # fmt: skip
EVALUATIONS = {"dense": dense, "coarse to fine": coarse_to_fine}


def between_nodes(grid: Tensor) -> Field:
    """The trilinear interpolation of logits (n, n, n) on [-BOUNDS, BOUNDS]^3."""

    def logits(points: Tensor) -> Tensor:
        at = (points / BOUNDS).flip(-1)[None, None, None]  # grid_sample's x is the last axis
        values = F.grid_sample(grid[None, None], at, align_corners=True, padding_mode="border")
        return values[0, 0, 0, 0]

    return logits


def fit(grid: Tensor, steps: int, points: int = 4096) -> tuple[ShapeDecoder, Tensor, float]:
    """Fits a decoder and its latents to a grid's occupancy (cross-entropy; half the points are near
    the surface). Returns decoder, latents, and their IoU with the grid at its nodes."""
    torch.manual_seed(0)
    network = ShapeDecoder(FITTED)
    latents = torch.nn.Parameter(torch.randn(1, FITTED.latents, FITTED.channels))
    optimizer = torch.optim.AdamW([*network.parameters(), latents], lr=2e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    truth = between_nodes(grid)
    inside = grid > 0
    near = (F.max_pool3d(inside.float()[None, None], 3, 1, 1)[0, 0] > 0) & (
        F.max_pool3d((~inside).float()[None, None], 3, 1, 1)[0, 0] > 0
    )
    cell = 2 * BOUNDS / (len(grid) - 1)
    surface = near.nonzero() * cell - BOUNDS
    for _ in range(steps):
        close = surface[torch.randint(len(surface), (points // 2,))]
        close = close + cell * torch.randn_like(close)
        queries = torch.cat([close, (2 * torch.rand(points // 2, 3) - 1) * BOUNDS])
        loss = F.binary_cross_entropy_with_logits(
            network(latents, queries[None])[0, :, 0], (truth(queries) > 0).float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    latents = latents.detach()
    found = dense(network.eval().field(latents), len(grid) - 1, BOUNDS).values > 0
    return network, latents, float((found & inside).sum() / (found | inside).sum())


def field_of(kind: str, place: Path) -> tuple[Field, float]:
    """The field that `furniture` or `released` saved at `place`, and the half side of its cube.

    A released decoder's latents are random.
    """
    if kind == "interpolated":
        return between_nodes(torch.from_numpy(np.load(place))), BOUNDS
    if kind == "fitted":
        saved = torch.load(place, weights_only=True)
        network = ShapeDecoder(FITTED).eval()
        network.load_state_dict(saved["network"])
        return network.field(saved["latents"]), BOUNDS
    network = load_shape_decoder(open_checkpoint(place))
    config = network.config
    rng = torch.Generator().manual_seed(0)
    return network.field(torch.randn(1, config.latents, config.channels, generator=rng)), (
        config.bounds
    )


def evaluate(
    kind: str, place: Path, how: str, resolution: int, threads: int, out: Path
) -> dict[str, Any]:
    """Writes the grid into the file `out`; returns queries, seconds and bytes without the field."""
    torch.set_num_threads(threads)
    return_large_blocks()
    field, bounds = field_of(kind, place)
    field(torch.zeros(8000, 3))  # libraries load their code
    reset_peak()
    before = resident()
    start = time.perf_counter()
    grid = EVALUATIONS[how](field, resolution, bounds)
    seconds = time.perf_counter() - start
    peak = resident(peak=True)
    np.save(out, grid.values.numpy())
    held = None if peak is None or before is None else peak - before
    return {"queries": grid.queries, "seconds": seconds, "bytes": held}


def compare(full: np.ndarray, part: np.ndarray, bounds: float) -> dict[str, Any]:
    """Differences of two grids and of their surfaces before cleaning."""
    a, b = surface_from_grid(full, bounds), surface_from_grid(part, bounds)
    same_faces = np.array_equal(a.faces, b.faces)
    found = report(a)
    return {
        "signs_that_differ": int(((full > 0) != (part > 0)).sum()),
        "same_faces": same_faces,
        "identical": same_faces and np.array_equal(a.vertices, b.vertices),
        "farthest_vertex": float(np.abs(a.vertices - b.vertices).max()) if same_faces else None,
        "vertices": len(a.vertices),
        "faces": len(a.faces),
        "pieces": found.components,
        "watertight": found.watertight,
    }


def both(
    kind: str, name: str, place: Path, bounds: float, work: Path, options: argparse.Namespace
) -> None:
    """Evaluates one field by both methods, compares and records them."""
    row: dict[str, Any] = {"kind": kind, "resolution": options.resolution, "methods": {}}
    row["threads"] = options.threads
    grids = []
    for how in EVALUATIONS:
        out = work / f"{how.replace(' ', '-')}.npy"
        # In a fresh process, which has allocated nothing before.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            arguments = (kind, place, how, options.resolution, options.threads, out)
            row["methods"][how] = pool.submit(evaluate, *arguments).result()
        grids.append(np.load(out))
        out.unlink()
    row |= compare(grids[0], grids[1], bounds)
    if kind == "fitted":
        row["iou"] = torch.load(place, weights_only=True)["iou"]
    published.save("grids", f"{kind}, {name}, {options.resolution}", row | {"name": name})
    print(kind, name, row, flush=True)


def furniture(work: Path, options: argparse.Namespace) -> None:
    """Shapes generated from unseen images, each as both of its fields."""
    pipeline = Pipeline.from_model("furniture", device="cpu")
    views = [view for view in held_out("unseen-views") if view.name in IMAGES]
    for number, view in enumerate(views):
        if view.name not in options.images:
            continue
        place = work / f"{view.name}.npy"
        cond = pipeline.condition(Image.open(view.image_path), view.name)
        grid = pipeline.grid(pipeline.latents(cond, pipeline.noise(number)))
        np.save(place, grid)
        if "interpolated" in options.fields:
            both("interpolated", view.name, place, BOUNDS, work, options)
        if "fitted" not in options.fields:
            continue
        fitted = work / f"{view.name}.pt"
        network, latents, iou = fit(torch.from_numpy(grid), options.fit_steps)
        saved = {"network": network.state_dict(), "latents": latents, "iou": iou}
        torch.save(saved, fitted)
        both("fitted", view.name, fitted, BOUNDS, work, options)
        fitted.unlink()


def released(name: str, work: Path, options: argparse.Namespace) -> None:
    """A released decoder at full size, with random weights."""
    folder = work / f"{name}-decoder"
    if not folder.exists():
        write(name, folder, parts=("decoder",))
    both("released", name, folder, open_checkpoint(folder).decoder.bounds, work, options)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=("furniture", "hunyuan3d-2mini", "step1x-3d", "page"))
    parser.add_argument("--work", type=Path, default=Path("grids-work"))
    parser.add_argument("--resolution", type=int, default=384)
    parser.add_argument("--images", nargs="+", default=list(IMAGES), choices=IMAGES)
    parser.add_argument("--fields", nargs="+", default=["interpolated", "fitted"],
                        choices=("interpolated", "fitted"))  # fmt: skip
    parser.add_argument("--fit-steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.source != "page":
        options.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(options.threads)
        if options.source == "furniture":
            furniture(options.work, options)
        else:
            released(options.source, options.work, options)
    published.page()


if __name__ == "__main__":
    sys.exit(main())
