"""`vitapack analyze`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.compressor.options import AnalyzeOptions
from vitapack.runtime.choices import METRICS
from vitapack.runtime.files import destination
from vitapack.terminal import COUNT, SEED, filled, say, watched

HELP = "measure how vital each block is to the geometry"
EXAMPLE = "analyze furniture --images photos -o vitality.json"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="original checkpoint: a folder or file in released layout, or `furniture`")
    add("--images", type=Path, required=True, metavar="DIR")
    add("-o", "--out", type=Path, required=True)
    add("--metric", choices=METRICS)
    add("--points", type=COUNT)
    add("--steps", type=COUNT)
    add("--guidance", type=float)
    add("--seed", type=SEED)
    add("--limit", type=COUNT, help="use only the first N images")
    add("--jobs", type=COUNT, help="worker processes; use 1 on a GPU")
    add("--resume", action="store_true", help="continue an interrupted analysis from its journal")
    add("--device", default="cpu")


def run(options: Namespace) -> None:
    from vitapack.compressor.vitality.analyze import analyze
    from vitapack.compressor.vitality.table import describe
    from vitapack.runtime.condition.images import find_images, load_image
    from vitapack.runtime.pipeline.pipeline import Pipeline

    settings = filled(AnalyzeOptions, options)
    destination(options.out)
    paths = find_images([options.images])[: options.limit]
    images = [(path.stem, load_image(path)) for path in paths]
    pipeline = Pipeline.from_model(options.model, device=options.device)
    with watched(options.quiet) as control:
        result = analyze(pipeline, images, options.out, settings, control=control)
    say(options, result.to_json(), describe(result))
