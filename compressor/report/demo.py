"""`vitapack demo`: runs every command's function on the bundled furniture model, with a report.

Steps: vitality, plan, compression, generation, comparison. Two packed files are made: one with
every block in int8 and exact modulation tables, one by the automatic plan. As a control, random
plans prune as many blocks of each kind as the automatic plan does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vitapack
from vitapack.compressor.evaluate.metrics import evaluate_folders, grid_iou
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.packing.quantizers import one_thread
from vitapack.compressor.planning.automatic import plan_auto
from vitapack.compressor.planning.files import describe as describe_plan
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.planning.layer_maps import plan_random
from vitapack.compressor.report.render import frame_of, render
from vitapack.compressor.report.report import (
    Block,
    MetricRow,
    ReportData,
    ReportObject,
    SizePart,
    write_report,
)
from vitapack.compressor.vitality.analyze import analyze
from vitapack.compressor.vitality.table import Vitality
from vitapack.runtime.decode.mesh import Mesh, save, surface_from_grid
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.furniture.family import HeldOut, held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.files import atomic_path
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.sizes import SizeTable
from vitapack.runtime.networks.network import Network
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control

# Half the model's steps and under half of `analyze`'s points keep the demo within minutes on two
# cores; the model card measures vitality with 10,000 points on more images.
ANALYSIS_IMAGES = 6
ANALYSIS_STEPS = 10
ANALYSIS_POINTS = 4096
RANDOM_DRAWS = 3
TITLES = {"int8": "int8, unpruned", "auto": "automatic plan"}


@dataclass(frozen=True)
class Figures:
    """The results of the demo, as JSON data and as text."""

    data: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Output:
    """One model's output for one image."""

    name: str
    grid: np.ndarray
    mesh: Mesh | None  # None if the grid has no surface


def grid_of(
    pipeline: Pipeline,
    image: HeldOut,
    seed: int,
    dit: Network | None = None,
    control: Control | None = None,
) -> np.ndarray:
    """The grid (R, R, R) generated from a held-out image, with `dit` as the network if given."""
    cond = pipeline.condition(Image.open(image.image_path), image.name, control)
    latents = pipeline.latents(cond, pipeline.noise(seed), dit=dit, control=control)
    return pipeline.grid(latents, control)


def generate_all(
    pipeline: Pipeline, images: list[HeldOut], control: Control, phase: str
) -> list[Output]:
    """Grids and meshes of all images. The seed of each is its number."""
    outputs = []
    for number, image in enumerate(images):
        control.step(phase, number, len(images))
        grid = grid_of(pipeline, image, number, control=control.quiet())
        try:
            mesh = pipeline.surface(grid)
        except UserError:
            mesh = None
        outputs.append(Output(image.name, grid, mesh))
    control.report(phase, len(images), len(images))
    return outputs


def run_demo(
    out: Path, *, images: int = 8, model: str = "furniture", control: Control | None = None
) -> Figures:
    """Writes OUT/report.html, meshes, renders, packed files and figures.json; returns the figures.

    images: number of images in the report. After an interruption the same call continues the
    analysis. Raises UserError if fewer images are bundled.
    """
    control = control or Control()
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    out = Path(out)
    checkpoint = open_checkpoint(model)
    every = list(held_out("unseen-views"))
    if images + ANALYSIS_IMAGES > len(every):
        raise UserError(f"--images {images}: at most {len(every) - ANALYSIS_IMAGES} are bundled")
    shown, studied = every[:images], every[-ANALYSIS_IMAGES:]

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)

    original = Pipeline.from_model(model, device="cpu")
    # A journal belongs to one model, so the file name holds the model's digest.
    table = out / f"vitality-{original.source_sha256[:8]}.json"
    # The analysis runs one process per core; more threads would compete.
    with timed("analyze"), one_thread():
        vitality = analyze(
            original, [(p.name, Image.open(p.image_path)) for p in studied], table,
            points=ANALYSIS_POINTS, steps=ANALYSIS_STEPS, resume=True,
            jobs=os.cpu_count() or 1, curve_images=4, control=control,
        )  # fmt: skip
    auto = plan_auto(vitality)
    with atomic_path(out / "plan.json") as temporary:
        temporary.write_text(auto.dumps())
    plans = {"int8": resolve_plan("int8", checkpoint), "auto": auto}

    sizes: dict[str, SizeTable] = {}
    with timed("compress"):
        for name, plan in plans.items():
            sizes[name] = compress(
                checkpoint, plan, out / f"furniture-{name}.safetensors", control=control
            )

    outputs: dict[str, list[Output]] = {}
    with timed("generate"):
        outputs["original"] = generate_all(original, shown, control, "original")
        for name in plans:
            packed = Pipeline.from_packed(out / f"furniture-{name}.safetensors", device="cpu")
            outputs[name] = generate_all(packed, shown, control, TITLES[name])
    draws = random_pruning(original, auto, shown, outputs["original"], control)

    truth = [
        Output(p.name, p.grid, surface_from_grid(p.grid, original.decoder.bounds)) for p in shown
    ]
    with timed("evaluate"):
        for name, results in (outputs | {"truth": truth}).items():
            write_meshes(out / "meshes" / name, results)
        tables = {
            name: evaluate_folders(
                out / "meshes" / reference, out / "meshes" / candidate, control=control
            )["summary"]
            for name, (candidate, reference) in {
                "int8, unpruned, to the original": ("int8", "original"),
                "automatic plan to the original": ("auto", "original"),
                "original to the true shape": ("original", "truth"),
            }.items()
        }

    grids = {
        name: [
            float(grid_iou(a.grid, b.grid))
            for a, b in zip(outputs["original"], outputs[name], strict=True)
        ]
        for name in plans
    }
    fp16 = 2 * checkpoint.parameters()
    seconds["total"] = round(time.perf_counter() - began, 1)
    data = {
        "pictures": [p.name for p in shown],
        "grid_iou_to_original": {name: float(np.mean(values)) for name, values in grids.items()},
        "random_pruning_grid_iou": draws,
        "dit_bytes": {"original": fp16, **{name: size.dit for name, size in sizes.items()}},
        "blocks_kept": {name: len(plan.blocks) for name, plan in plans.items()},
        "metrics": tables,
        "stability": {k: vars(v) for k, v in vitality.stability.items()},
        "seconds": seconds,
    }
    with atomic_path(out / "figures.json") as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
    columns = {"true shape": truth, "original": outputs["original"]}
    columns |= {TITLES[name]: outputs[name] for name in plans}
    write_renders(out / "pictures", columns)
    write_report(
        out / "report.html",
        report_data(shown, columns, vitality, auto, checkpoint, sizes, fp16, data),
    )
    return Figures(data, summary(out, data, describe_plan(auto)))


def random_pruning(
    pipeline: Pipeline, plan: LayerMap, images: list[HeldOut], full: list[Output], control: Control
) -> list[dict[str, Any]]:
    """Mean grid IoU to the original, with the plan's blocks pruned and with as many pruned at
    random. All in float32, so that only the choice of blocks differs."""
    everything = {(kind, i) for kind, n in plan.totals.items() for i in range(n)}
    maps = [plan] + [plan_random(seed, plan) for seed in range(RANDOM_DRAWS)]
    total = len(maps) * len(images)
    scored = []
    for number, layer_map in enumerate(maps):
        kept = {(block.kind, block.index) for block in layer_map.blocks}
        network = pipeline.dit.without(*sorted(everything - kept))
        scores = []
        for index, image in enumerate(images):
            control.step("pruned at random", number * len(images) + index, total)
            grid = grid_of(pipeline, image, index, network, control.quiet())
            scores.append(float(grid_iou(full[index].grid, grid)))
        scored.append(
            {
                "blocks": "vitality" if number == 0 else f"random draw {number}",
                "pruned": [f"{kind} {i}" for kind, i in sorted(everything - kept)],
                "grid_iou": float(np.mean(scores)),
            }
        )
    control.report("pruned at random", total, total)
    return scored


def write_meshes(folder: Path, outputs: list[Output]) -> None:
    """Writes one GLB file per mesh."""
    for output in outputs:
        if output.mesh is not None:
            save(output.mesh, folder / f"{output.name}.glb")


def write_renders(folder: Path, columns: dict[str, list[Output]]) -> None:
    """Writes one PNG per mesh; the renders of one image share a frame."""
    for row in zip(*columns.values(), strict=True):
        meshes = [output.mesh for output in row if output.mesh is not None]
        for title, output in zip(columns, row, strict=True):
            if output.mesh is not None:
                rendered = render(output.mesh, frame=frame_of(*meshes))
                name = f"{output.name}-{title.replace(',', '').replace(' ', '-')}.png"
                with atomic_path(folder / name) as temporary:
                    Image.fromarray(rendered).save(temporary)


def report_data(
    shown: list[HeldOut],
    columns: dict[str, list[Output]],
    vitality: Vitality,
    auto: LayerMap,
    checkpoint: Any,
    sizes: dict[str, SizeTable],
    fp16: int,
    data: dict[str, Any],
) -> ReportData:
    """The report of `run_demo`'s results."""
    kept = {(block.kind, block.index): block.bits for block in auto.blocks}
    scores = data["grid_iou_to_original"]
    random = [row["grid_iou"] for row in data["random_pruning_grid_iou"][1:]]
    bytes_of = data["dit_bytes"]
    stability = vitality.stability.get("all")
    sections = [name for name, size in sizes["auto"].parts.items() if size]
    component_bytes = {
        name: 2 * checkpoint.parameters(key)
        for name, key in (("shape decoder", "shape_decoder"), ("conditioner", "conditioner"))
    }
    return ReportData(
        title="vitapack demo: the furniture model, original and compressed",
        lead=(
            "Images that the model was not trained on, of shapes that it was trained on; one seed "
            "per row. Drag a mesh to turn it.",
        ),
        headline=(
            (f"{scores['int8']:.3f}", "mean IoU to the original, int8 unpruned"),
            (f"{bytes_of['int8'] / fp16:.0%}", "of the network's fp16 bytes"),
            (f"{scores['auto']:.3f}", "mean IoU to the original, automatic plan"),
            (f"{bytes_of['auto'] / fp16:.0%}", "of the network's fp16 bytes"),
        ),
        objects=[
            ReportObject(
                name=image.name,
                image=str(image.image_path),
                meshes={title: results[row].mesh for title, results in columns.items()},
            )
            for row, image in enumerate(shown)
        ],
        blocks=[
            Block(b.kind, b.index, b.mean, b.low, b.high, kept.get((b.kind, b.index)))
            for b in vitality.blocks
        ],
        vitality_floor=float(np.mean([b.floor for b in vitality.blocks])),
        vitality_note=(
            f"Order of the blocks in halves of the images: Spearman {stability.mean:.2f} "
            f"({stability.low:.2f} to {stability.high:.2f}). "
            if stability
            else ""
        )
        + f"Pruned by vitality alone: IoU {data['random_pruning_grid_iou'][0]['grid_iou']:.3f}; as "
        f"many blocks pruned at random: {', '.join(f'{value:.3f}' for value in random)}.",
        sizes=[
            SizePart("network, fp16", fp16, None),
            *(
                SizePart(name, component_bytes.get(name), sizes["auto"].parts.get(name))
                for name in sections
            ),
        ],
        sizes_note=f"Packed: the automatic plan. int8 unpruned: {bytes_of['int8']:,} bytes.",
        metrics=[MetricRow(name, summary) for name, summary in data["metrics"].items()],
        settings={
            "analysis": f"{ANALYSIS_IMAGES} images, {ANALYSIS_STEPS} steps, "
            f"{ANALYSIS_POINTS} points",
            "seconds": ", ".join(f"{k} {v:g}" for k, v in data["seconds"].items()),
            "sampler": json.dumps(checkpoint.sampler.to_json()),
        },
        versions={"vitapack": vitapack.__version__, "torch": torch.__version__},
    )


def summary(out: Path, data: dict[str, Any], plan: str) -> str:
    """The figures as text. plan: the description of the automatic plan."""
    scores, bytes_of = data["grid_iou_to_original"], data["dit_bytes"]
    lines = [plan, ""]
    for name, title in TITLES.items():
        lines.append(
            f"{title:16} {bytes_of[name] / bytes_of['original']:6.1%} of the network's fp16 bytes, "
            f"IoU to the original {scores[name]:.3f}"
        )
    for row in data["random_pruning_grid_iou"]:
        lines.append(f"pruned by {row['blocks']:14} IoU to the original {row['grid_iou']:.3f}")
    lines.append(f"{data['seconds']['total']:.0f} s; open {out / 'report.html'}")
    return "\n".join(lines)
