"""Measures the V-IoU of int8 activations against weight-only on the bundled model's unseen views.

Images are distributed over one single-threaded process per core: so small a network gains little
from a second thread. Finished images are recorded in a journal in the work folder, named after the
weights, so that an interrupted run continues, and another model starts from the beginning.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitapack.compressor.evaluate.metrics import grid_iou
from vitapack.compressor.evaluate.statistics import mean_interval
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.report.demo import grid_of
from vitapack.runtime.families.furniture.family import held_out
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.pipeline.pipeline import Pipeline

PLANS = ("int8", "int4")
SCORES = ("a8 to a16", "a16 to truth", "a8 to truth")


def measure(work: Path, images: int) -> dict[str, Any]:
    """Mean V-IoU and 95 % interval of each score and plan on the first `images` views."""
    checkpoint = open_checkpoint("furniture")
    weights = checkpoint.source(hashed=True)["sha256"][:12]
    packed = {plan: work / f"furniture-{weights}-{plan}.safetensors" for plan in PLANS}
    for plan, path in packed.items():
        if not path.exists():
            compress(checkpoint, resolve_plan(plan, checkpoint), path)
    count = min(images, len(list(held_out("unseen-views"))))
    journal = work / f"furniture-{weights}.jsonl"
    done = _read(journal)
    wanted = [(plan, number) for number in range(count) for plan in PLANS]
    left = [task for task in wanted if task not in done]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool,
        journal.open("a") as file,
    ):
        tasks = {pool.submit(scores, packed[plan], number): (plan, number) for plan, number in left}
        for task in as_completed(tasks):
            plan, number = tasks[task]
            done[plan, number] = task.result()
            file.write(json.dumps({"plan": plan, "number": number, "scores": task.result()}) + "\n")
            file.flush()
            print(f"{len(done)}/{len(wanted)}", file=sys.stderr, flush=True)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for plan in PLANS:
        found[plan] = {"weights": weights}
        for name in SCORES:
            values = np.array([done[plan, number][name] for number in range(count)])
            interval = [float(v) for v in mean_interval(values, rng)]
            found[plan][name] = {"mean": float(values.mean()), "interval": interval, "n": count}
    return found


def scores(packed: Path, number: int) -> dict[str, float]:
    """One image's V-IoUs, with a8 and a16 from the same noise."""
    view = list(held_out("unseen-views"))[number]
    grids = {mode: grid_of(pipeline(packed, mode), view, number) for mode in ("a16", "a8")}
    return {
        "a8 to a16": grid_iou(grids["a8"], grids["a16"]),
        "a16 to truth": grid_iou(grids["a16"], view.grid),
        "a8 to truth": grid_iou(grids["a8"], view.grid),
    }


@functools.cache
def pipeline(packed: Path, mode: str) -> Pipeline:
    return Pipeline.from_packed(packed, device="cpu", compute=mode)


def _read(journal: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The finished images of an interrupted run; a truncated line is ignored."""
    done = {}
    for line in journal.read_text().splitlines() if journal.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        done[row["plan"], row["number"]] = row["scores"]
    return done
