"""`vitapack plan`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.terminal import SIZE, say, write_json

HELP = "choose which blocks to keep, and in how many bits"
EXAMPLE = "plan vitality.json -o plan.json --target-size 6MB"
THRESHOLDS = ("tau-double", "tau-single", "tau8-double", "tau8-single")


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("vitality", type=Path)
    add("-o", "--out", type=Path, required=True)
    add(
        "--auto",
        action="store_true",
        help="thresholds from the measured pruning curve (the default)",
    )
    add("--max-distance", type=float, help="auto: largest EMD to the original's output")
    add(
        "--target-size",
        type=SIZE,
        metavar="SIZE",
        help="size of network, tables and header; embedded components are added to it",
    )
    add("--paper", action="store_true", help="the family's published layer map")
    for name in THRESHOLDS:
        add(f"--{name}", type=float)


def run(options: Namespace) -> None:
    from vitapack.compressor.planning.files import describe, from_options

    names = [name.replace("-", "_") for name in THRESHOLDS]
    layer_map = from_options(
        options.vitality,
        target_size=options.target_size,
        paper=options.paper,
        max_distance=options.max_distance,
        taus={n: value for n in names if (value := getattr(options, n)) is not None},
    )
    write_json(options.out, layer_map.to_json())
    say(options, layer_map.to_json(), describe(layer_map))
