"""`vitapack plan`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from vitapack.compressor.options import PlanOptions
from vitapack.runtime.format.layermap import KINDS
from vitapack.terminal import SIZE, filled, say, write_json

HELP = "choose which blocks to keep, and in how many bits"
EXAMPLE = "plan vitality.json -o plan.json --target-size 6MB"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("vitality", type=Path)
    add("-o", "--out", type=Path, required=True)
    add(
        "--auto",
        action="store_true",
        help="thresholds from the measured pruning curve (the default)",
    )
    add("--max-distance", type=float, help="with --auto: largest EMD to the original's output")
    add(
        "--target-size",
        type=SIZE,
        metavar="SIZE",
        help="size of network, tables and header; embedded components are added to it",
    )
    add("--paper", action="store_true", help="the family's published layer map")
    for kind in KINDS:
        add(f"--tau-{kind}", type=float, help=f"prune {kind} blocks below this vitality")
        add(f"--tau8-{kind}", type=float, help=f"8 bits for {kind} blocks above this vitality")


def run(options: Namespace) -> None:
    from vitapack.compressor.planning.files import describe, from_options

    settings = replace(
        filled(PlanOptions, options), tau=by_kind(options, "tau"), tau8=by_kind(options, "tau8")
    )
    layer_map = from_options(options.vitality, settings)
    write_json(options.out, layer_map.to_json())
    say(options, layer_map.to_json(), describe(layer_map))


def by_kind(options: Namespace, name: str) -> dict[str, float]:
    """The given thresholds by block kind."""
    values = {kind: getattr(options, f"{name}_{kind}") for kind in KINDS}
    return {kind: value for kind, value in values.items() if value is not None}
