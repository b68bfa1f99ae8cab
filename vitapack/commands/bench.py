"""`vitapack bench`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.runtime.choices import COMPUTES
from vitapack.runtime.files import destination
from vitapack.runtime.options import BenchOptions
from vitapack.terminal import COUNT, filled, say, write_json

HELP = "measure bytes, operations, seconds and memory, compared with the original"
EXAMPLE = "bench model.safetensors --original hunyuan3d-dit-v2-mini"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a packed file, or an original checkpoint")
    add("--original", metavar="MODEL", help="the original checkpoint of the packed file")
    add("-o", "--out", type=Path)
    add("--device")
    add("--compute", choices=COMPUTES)
    add("--repeats", type=COUNT)
    add("--cond-tokens", type=COUNT, help="number of condition tokens")
    add("--steps", type=COUNT, help="denoising steps of the generation")
    add(
        "--no-pass",
        action="store_false",
        dest="whole_pass",
        help="time denoising steps only, without a generation",
    )
    add(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: capture network evaluations as CUDA graphs",
    )
    add("--resolution", type=COUNT, help="cells per side of the decoded grid")


def run(options: Namespace) -> None:
    from vitapack.runtime.tools.bench import bench, describe

    if options.out:
        destination(options.out)
    result = bench(
        options.model,
        filled(BenchOptions, options),
        note=lambda line: None if options.quiet else print(line, file=sys.stderr, flush=True),
    )
    if options.out:
        write_json(options.out, result)
    say(options, result, describe(result))
