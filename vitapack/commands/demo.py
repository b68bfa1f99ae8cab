"""`vitapack demo`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.terminal import COUNT, say, watched

HELP = "analyze, compress, generate and compare with the bundled furniture model"
EXAMPLE = "demo --out demo-out"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-out"), metavar="DIR")
    add("--images", type=COUNT, default=8, help="images in the report")


def run(options: Namespace) -> None:
    from vitapack.compressor.report.demo import run_demo

    with watched(options.quiet) as control:
        figures = run_demo(options.out, images=options.images, control=control)
    say(options, figures.data, figures.text)
