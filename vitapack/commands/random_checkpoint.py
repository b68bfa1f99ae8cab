"""`vitapack random-checkpoint`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.runtime.choices import NETWORKS, names
from vitapack.terminal import SEED, say, watched

HELP = "write full-size random weights in a released layout, for tests and benchmarks"
EXAMPLE = "random-checkpoint hunyuan3d-2mini -o mini"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("name", help="hunyuan3d-2.0, hunyuan3d-2mini, step1x-3d, trellis-ss, ...")
    add("-o", "--out", type=Path, required=True, metavar="DIR")
    add(
        "--parts",
        type=names,
        default=list(NETWORKS),
        help=f"networks to write, from {','.join(NETWORKS)} (default: all)",
    )
    add("--seed", type=SEED, default=0)


def run(options: Namespace) -> None:
    from vitapack.compressor.tools.random_checkpoint import write

    with watched(options.quiet) as control:
        files = write(
            options.name, options.out, parts=options.parts, seed=options.seed, control=control
        )
    written = [str(options.out / name) for name in (*files.texts, *files.tensors)]
    say(options, {"written": written, "bytes": files.nbytes}, "\n".join(written))
