"""`vitapack tune`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.terminal import COUNTS, say, watched

HELP = "measure a file's GEMMs on this GPU once and keep the fastest configurations"
EXAMPLE = "tune model.safetensors --tokens 512,1370"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("packed", type=Path)
    add(
        "--tokens",
        type=COUNTS,
        default=[512, 1370],
        help="numbers of latent and condition tokens, e.g. 512,1370",
    )
    add("--device", default="cuda:0")
    add("--again", action="store_true", help="measure cached sizes again")


def run(options: Namespace) -> None:
    from vitapack.runtime.tools.tune import describe, tune_packed

    with watched(options.quiet) as control:
        result = tune_packed(
            options.packed, options.tokens, device=options.device, again=options.again,
            control=control,
        )  # fmt: skip
    say(options, result, describe(result))
