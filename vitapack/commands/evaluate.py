"""`vitapack evaluate`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.compressor.options import EvaluateSettings
from vitapack.runtime.choices import ALIGNMENTS
from vitapack.runtime.files import destination
from vitapack.terminal import COUNT, filled, say, watched, write_json

HELP = "compare two folders of meshes by name"
EXAMPLE = "evaluate originals compressed -o report.json"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("reference", type=Path, metavar="REFERENCE_DIR")
    add("candidate", type=Path, metavar="CANDIDATE_DIR")
    add("-o", "--out", type=Path)
    add("--resolution", type=COUNT, help="voxels along the longest side")
    add("--points", type=COUNT, help="surface samples per mesh")
    add("--tau", type=float, help="distance threshold of the F-score (the longest side is 2)")
    add("--align", choices=ALIGNMENTS)


def run(options: Namespace) -> None:
    from vitapack.compressor.evaluate.metrics import describe, evaluate_folders

    if options.out:
        destination(options.out)
    settings = filled(EvaluateSettings, options)
    with watched(options.quiet) as control:
        result = evaluate_folders(options.reference, options.candidate, settings, control=control)
    if options.out:
        write_json(options.out, result)
    say(options, result, describe(result))
