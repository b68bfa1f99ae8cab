"""`vitapack evaluate`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.runtime.choices import ALIGNMENTS
from vitapack.runtime.files import destination
from vitapack.terminal import COUNT, progress, say, write_json

HELP = "compare two folders of meshes by name"
EXAMPLE = "evaluate originals compressed -o report.json"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("reference", type=Path, metavar="REFERENCE_DIR")
    add("candidate", type=Path, metavar="CANDIDATE_DIR")
    add("-o", "--out", type=Path)
    add("--resolution", type=COUNT, default=64, help="voxels along the longest side")
    add("--points", type=COUNT, default=10_000, help="surface samples per mesh")
    add(
        "--tau",
        type=float,
        default=0.05,
        help="distance threshold of the F-score (the longest side is 2)",
    )
    add("--align", choices=ALIGNMENTS, default="rigid")


def run(options: Namespace) -> None:
    from vitapack.compressor.evaluate.metrics import EvaluateSettings, describe, evaluate_folders

    if options.out:
        destination(options.out)
    settings = EvaluateSettings(
        resolution=options.resolution, points=options.points, tau=options.tau, align=options.align
    )
    with progress(options.quiet) as report:
        result = evaluate_folders(options.reference, options.candidate, settings, progress=report)
    if options.out:
        write_json(options.out, result)
    say(options, result, describe(result))
