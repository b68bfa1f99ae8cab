"""`vitapack bench`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.runtime.choices import COMPUTES
from vitapack.runtime.files import destination
from vitapack.terminal import COUNT, say, write_json

HELP = "measure bytes, operations, seconds and memory, compared with the original"
EXAMPLE = "bench model.safetensors --original hunyuan3d-dit-v2-mini"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a packed file, or an original checkpoint")
    add("--original", metavar="MODEL", help="the original checkpoint of the packed file")
    add("-o", "--out", type=Path)
    add("--device", default="auto")
    add("--compute", choices=COMPUTES, default="a16")
    add("--repeats", type=COUNT, default=5)
    add("--cond-tokens", type=COUNT, help="number of condition tokens")
    add("--steps", type=COUNT, help="denoising steps of the one generation")
    add(
        "--no-pass", action="store_true", help="time the network's steps only, without a generation"
    )
    add("--cuda-graphs", action="store_true", help="on a GPU: run the network as CUDA graphs")
    add("--resolution", type=COUNT, help="cells per side of the decoded grid")


def run(options: Namespace) -> None:
    from vitapack.runtime.tools.bench import bench, describe

    if options.out:
        destination(options.out)
    result = bench(
        options.model, original=options.original, device=options.device, compute=options.compute,
        repeats=options.repeats, cond_tokens=options.cond_tokens, resolution=options.resolution,
        sampling_steps=options.steps, whole_pass=not options.no_pass,
        cuda_graphs=options.cuda_graphs,
        note=lambda line: None if options.quiet else print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if options.out:
        write_json(options.out, result)
    say(options, result, describe(result))
